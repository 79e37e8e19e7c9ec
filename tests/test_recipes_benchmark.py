"""The comparisons of trainings: what is held out, how results are kept and summed up, and what each way trains."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from benchmarks.recipes import __main__ as command
from benchmarks.recipes.charts import line_chart
from benchmarks.recipes.measuring import Trained, level_losses
from benchmarks.recipes.results import Estimate, Result, append, as_text, read, rows
from benchmarks.recipes.samples import held_out, split
from benchmarks.recipes.training import config_of, full_loop, plain_loop, train_variant
from benchmarks.recipes.variants import PARTS, PRESET, QUICKSTART, REFERENCE, Variant
from sdlora.base.base import Base
from sdlora.base.checkpoint import find_base
from sdlora.base.load import load_base
from sdlora.formats.lora_file import read_lora
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def mini() -> Base:
    return load_base(find_base("mini"), device=torch.device("cpu"), dtype=torch.float32)


def result(name: str = "a", seed: int = 0, loss: float = 1.0, **measures: float) -> Result:
    return Result(
        name=name, style="pixel", seed=seed, conditions="c", seconds=1.0, held_out=[loss], neutral=[], measures=measures
    )


def test_the_interval_is_students() -> None:
    """By hand: the deviation of 1, 2, 6 is √7, and t is 4.303 for two degrees of freedom."""
    estimate = Estimate.of([1.0, 2.0, 6.0])
    assert estimate is not None
    assert estimate.half == pytest.approx(4.303 * math.sqrt(7) / math.sqrt(3), rel=1e-3)
    assert str(estimate) == "3.000 ± 6.573"
    assert str(Estimate.of([2.0])) == "2.000"
    assert Estimate.of([]) is None


def test_ratios_are_those_of_runs_with_the_same_seed() -> None:
    results = [result("a", 0, 1.0), result("a", 1, 10.0), result("b", 0, 0.5), result("b", 1, 5.0), result("b", 2, 9.0)]
    _, other = rows(results, ["a", "b"], "a")
    ratio = other.cells["of the reference's"]
    assert (ratio.mean, ratio.half, ratio.count) == (0.5, 0.0, 2)
    assert as_text([other]).splitlines()[0] == "| variant | runs | of the reference's | held-out loss |"


def test_an_interrupted_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    variants = [Variant(name="known"), Variant(name="other", settings=("lora.nonsense=1",))]
    arguments = argparse.Namespace(
        seeds=[0, 1], sets=["pixel"], steps=1, rank=2, subjects=0, image_steps=1, folder=tmp_path, only=None
    )
    monkeypatch.setattr(command, "load_base", lambda *_, **__: None)
    trained = []
    monkeypatch.setattr(command, "train_variant", lambda variant, config, base: trained.append(config.train.seed))
    monkeypatch.setattr(command, "level_losses", lambda *_: [0.5])
    monkeypatch.setattr(command, "held_out", lambda *_: None)
    command.run(variants, arguments, file)
    assert trained == [0, 1]
    said = capsys.readouterr().err
    assert said.count("other: left out, since this version does not know it") == 1
    assert "lora.nonsense" in said

    # The second line is torn: its run is done again, and the first one's is not.
    file.write_text(file.read_text()[:-20])
    command.run(variants, arguments, file)
    assert trained == [0, 1, 1]
    assert [each.seed for each in read(file)] == [0, 1]
    command.run(variants, arguments, file)
    assert trained == [0, 1, 1]


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.jsonl"
    for each in (result(style=0.25), result("b")):
        append(file, each)
    assert read(file) == [result(style=0.25), result("b")]


def test_six_of_each_set_are_held_out(tmp_path: Path, mini: Base) -> None:
    for style in ("blueprint", "pixel"):
        train, held = ({file.name for file in folder.glob("*.png")} for folder in split(style, tmp_path))
        assert (len(train), len(held), len(train & held)) == (30, 6, 0)
        assert train | held == {file.name for file in (ROOT / "datasets" / style).glob("*.png")}
    examples = held_out(mini, split("pixel", tmp_path)[1])
    assert examples.latents.shape == (6, 4, 16, 16)
    assert examples.captions[0].startswith("pixgrid, a")


def test_variants_have_names_of_their_own() -> None:
    for part, variants in PARTS.items():
        names = [variant.name for variant in variants]
        assert len(set(names)) == len(names)
        assert REFERENCE[part] in names


def test_every_variant_is_understood_or_left_out(tmp_path: Path) -> None:
    from sdlora.errors import ConfigError

    known = 0
    for variant in PRESET:
        try:
            config = config_of(variant, "pixel", 0, steps=7, rank=6, folder=tmp_path)
        except ConfigError:
            continue
        known += 1
        assert (config.lora.rank, config.train.steps) == (6, 7)
    assert known >= 20
    half = next(variant for variant in PRESET if variant.name == "alpha = rank / 2")
    assert config_of(half, "pixel", 0, steps=7, rank=6, folder=tmp_path).lora.alpha == 3


def test_averaging_is_of_the_newest_files(tmp_path: Path, mini: Base) -> None:
    variant = Variant(name="averaged", settings=(*QUICKSTART, "output.save_every=1"), averaged=2)
    config = config_of(variant, "pixel", 0, steps=3, rank=1, folder=tmp_path)
    trained = train_variant(variant, config, mini)
    output = tmp_path / "run" / "lora.safetensors"
    assert trained.files == (f"{output.with_stem('lora-000002')}:0.500000", f"{output}:0.500000")


def test_the_plain_loop_trains_the_unets_attention(tmp_path: Path, mini: Base) -> None:
    variant = Variant(name="example", how="peft")
    config = config_of(variant, "pixel", 0, steps=1, rank=2, folder=tmp_path)
    file = read_lora(plain_loop(config, 1e-2))
    attention = [name for name, _ in mini.unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert len(file.modules) == len(attention) > 0
    examples = held_out(mini, split("pixel", tmp_path)[1])
    before, after = (level_losses(Trained(base=mini, files=files), examples) for files in ((), (f"{file.path}:1",)))
    assert before != after


def test_full_fine_tuning_changes_the_modules_of_a_lora_alone(tmp_path: Path, mini: Base) -> None:
    settings = (*QUICKSTART, "optimizer.warmup_steps=0", "lora.targets=attention")
    config = config_of(Variant(name="full", settings=settings), "pixel", 0, steps=1, rank=1, folder=tmp_path)
    before = {name: parameter.clone() for name, parameter in mini.unet.named_parameters()}
    seen = []
    tuned = full_loop(config, mini, watch=lambda done, model: seen.append(done))
    assert seen == [1]
    changed = {name for name, value in tuned.unet.named_parameters() if not torch.equal(value, before[name])}
    attention = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
    assert changed == {name for name in before if name.endswith(attention)}
    # The first step of AdamW moves every weight with a gradient by its learning rate; little is added by weight decay.
    moves = torch.cat([(tuned.unet.get_parameter(name) - before[name]).abs().flatten() for name in changed])
    assert moves.quantile(0.5).item() == pytest.approx(config.optimizer.learning_rate, rel=0.05)
    assert all(torch.equal(value, before[name]) for name, value in mini.unet.named_parameters())


def test_a_chart_has_a_line_of_its_colour_for_each_name() -> None:
    chart = line_chart(
        "losses", {"one": [(1, 0.5), (4, 0.2)], "two": [(1, 0.3), (4, 0.3)]}, across="rank", logarithmic=True
    )
    colours = {colour for _, colour in chart.getcolors(1 << 20)}
    assert {(11, 83, 148), (56, 142, 60)} <= colours
    assert (230, 126, 34) not in colours


def test_the_notebook_about_ranks_runs_and_keeps_its_images(tmp_path: Path) -> None:
    """With few steps; the images that the file keeps are from the full run."""
    notebook = nbformat.read(ROOT / "notebooks" / "03-which-rank.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    parameters = next(cell for cell in notebook.cells if cell.cell_type == "code")
    changed = {"RANKS": "(1,)", "STEPS, EVERY": "2, 1", "SUBJECTS, IMAGE_STEPS": "1, 1", "OUT": repr(str(tmp_path))}
    lines = [line.partition(" = ") for line in parameters.source.splitlines()]
    assert {name for name, _, _ in lines} >= changed.keys()
    parameters.source = "\n".join(name + equals + changed.get(name, value) for name, equals, value in lines)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    last = [output for output in notebook.cells[-1].outputs if output.output_type == "execute_result"]
    assert "image/png" in last[0].data
