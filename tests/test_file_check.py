"""A written file is read back: what it changes, against float64 formulas and diffusers' UNet; and what is said of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel
from typer.testing import CliRunner

import sdlora
from sdlora.cli import app
from sdlora.errors import LoraFileError, TrainingError
from sdlora.formats.lora_writer import write_lora
from sdlora.lora.change import Change
from sdlora.lora.low_rank import LowRank
from sdlora.progress import Silence
from sdlora.randomness import Stream, generator
from sdlora.training import exports, loop
from sdlora.training.exports import write_run_file
from sdlora.training.file_check import FileCheck, PartChange, check_file
from sdlora.training.plan import plan_config
from tests.conftest import write_images
from tests.tiny import opened
from tests.training_runs import config_for, overrides, session_for


def checked(base: Path, images: Path, out: Path, *more: str) -> FileCheck:
    check = sdlora.train(config_for(base, images, out, *more)).result.check
    assert check is not None
    return check


def in_file(file: Path) -> dict[str, Tensor]:
    """kohya's key of each module -> alpha / rank · up @ down, float64."""
    tensors = {key: tensor.double() for key, tensor in load_file(file).items()}
    keys = [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]
    matrices = {key: (tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]) for key in keys}
    return {key: tensors[f"{key}.alpha"] / len(down) * (up @ down) for key, (up, down) in matrices.items()}


def test_what_a_file_changes_is_that_of_the_formula(
    tiny_base: Path, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    check = checked(tiny_base, finished[0], file, "train.steps=4")
    models = {
        "unet": UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet"),
        "text_encoder": CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder"),
    }
    deltas, layers, shares = in_file(file), {}, []
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        # transformers 5.6 took a level out of the text encoder's names.
        own = {prefix + name.replace(".", "_"): module for name, module in models[part].named_modules()}
        own |= {
            prefix + "text_model_" + name.replace(".", "_"): module for name, module in models[part].named_modules()
        }
        layers[part] = {key: own[key].weight.detach().double() for key in deltas if key.startswith(prefix)}
        change = math.sqrt(sum(deltas[key].square().sum().item() for key in layers[part]))
        whole = math.sqrt(sum(weight.square().sum().item() for weight in layers[part].values()))
        expected = PartChange(modules=len(layers[part]), norm=change, relative=change / whole)
        assert check.parts[part].modules == expected.modules > 0
        assert check.parts[part].norm == pytest.approx(expected.norm, rel=1e-4)
        assert check.parts[part].relative == pytest.approx(expected.relative, rel=1e-4)
        shares += [(deltas[key].norm() / weight.norm()).item() for key, weight in layers[part].items()]
    assert sum(len(found) for found in layers.values()) == len(deltas)
    assert check.typical == pytest.approx(float(np.median(shares)), rel=1e-4)
    assert f"UNet by {100 * check.parts['unet'].relative:.2g} %" in check.in_words


def test_the_difference_is_that_of_diffusers_own_unet(
    tiny_base: Path, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    """With the text encoder as it is: only the UNet is trained, on one caption, whose signs are not those of a prompt."""
    images, file = write_images(tmp_path / "images", 1), tmp_path / "x.safetensors"
    (images / "0.txt").write_text("zorb, [a plain: thing")
    more = ("train.steps=4", "optimizer.text_encoder_learning_rate=0")
    check = checked(tiny_base, images, file, *more)
    base = opened(tiny_base)
    encoder = base.text_encoders[0]
    ids = encoder.tokenizer("zorb, [a plain: thing", padding="max_length", max_length=77, return_tensors="pt").input_ids
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    levels = len(base.schedule.alphas_cumprod)
    timesteps = torch.tensor([levels // 6, levels // 2, 5 * levels // 6])
    noise = generator(0, Stream.COMPARISON_NOISE).standard_normal((3, 4, 8, 8), dtype=np.float32)
    with torch.no_grad():
        context = encoder.model(ids).last_hidden_state.repeat(3, 1, 1)
        alone = unet(torch.from_numpy(noise), timesteps, context).sample
        layers = {"lora_unet_" + name.replace(".", "_"): module for name, module in unet.named_modules()}
        for key, delta in in_file(file).items():
            layers[key].weight += delta.float()
        together = unet(torch.from_numpy(noise), timesteps, context).sample
    assert check.difference == pytest.approx(((together - alone).norm() / alone.norm()).item(), rel=1e-3)
    assert check.difference > 1e-3


@pytest.mark.parametrize("kind", ["locon", "dora", "loha", "lokr"])
def test_other_kinds_are_measured_and_the_base_is_as_before(
    kind: str, tiny_base: Path, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    # Alphas that a bfloat16 tensor rounds.
    more = (f"lora.kind={kind}", "output.precision=bfloat16", "lora.alpha=1.7", "lora.rslora=true")
    file, plan = (
        tmp_path / "x.safetensors",
        plan_config(config_for(tiny_base, finished[0], tmp_path / "y.safetensors", *more)),
    )
    session = session_for(tiny_base, finished[0], tmp_path / "y.safetensors", *more)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in session.adapter.parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=drawn)
    session.adapter.begin_step()
    base, trained = session.base, session.adapter.changes()
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    write_run_file(
        file, plan, base, trained, step=1, tokens=75, started_at=0.0, validation_loss=None, identity_key="x",
        progress=Silence(),
    )  # fmt: skip
    check = check_file(file, plan, base, trained, Silence())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.unet.state_dict().items())
    modules = base.modules()
    norms = [
        change.delta(weight.double()).norm().item()
        for name, change in trained.items()
        if name.startswith("unet.") and isinstance(weight := modules[name].weight.detach(), Tensor)
    ]
    assert check.parts["unet"].norm == pytest.approx(math.hypot(*norms), rel=0.02)
    assert check.difference is not None
    assert check.difference > 0.01
    name = next(iter(trained))
    other: Mapping[str, Change] = {**trained, name: next(c for n, c in trained.items() if n != name)}
    with pytest.raises(LoraFileError, match=r"1 of .* modules, read back, are not what was trained"):
        check_file(file, plan, base, other, Silence())


def test_a_file_that_is_not_what_was_trained_is_removed_and_the_state_kept(
    tiny_base: Path, finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, more = tmp_path / "x.safetensors", ("train.steps=3",)

    def wrong(path: Path, plan: object, base: object, weights: Mapping[str, Change], **facts: object) -> bool:
        name, change = next(iter(weights.items()))
        assert isinstance(change, LowRank)
        other = LowRank(down=change.down, up=change.up, alpha=change.alpha + 1)
        return write_run_file(path, plan, base, {**weights, name: other}, **facts)  # ty: ignore

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_run_file", wrong)
        with pytest.raises(
            TrainingError, match=r"1 of .* modules, read back, are not what was trained(?s:.*)checkpoint is kept"
        ):
            sdlora.train(config_for(tiny_base, finished[0], output, *more))
    assert not output.exists()
    result = sdlora.train(config_for(tiny_base, finished[0], output, *more)).result
    assert result.resumed_from == 3
    assert result.check is not None


def test_values_that_a_file_cannot_hold_are_not_written(tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for value, said in ((1e6, "too large for float16.*write float32"), (math.nan, "hold NaN or Inf")):
        change = LowRank(down=torch.ones(2, 4), up=torch.full((4, 2), value), alpha=1.0)
        with pytest.raises(LoraFileError, match=said):
            write_lora(tmp_path / "x.safetensors", {name: change}, {}, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_run_beyond_its_precision_writes_no_file_and_says_why(
    tiny_base: Path,
    finished: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def large(path: Path, plan: object, base: object, weights: Mapping[str, Change], **facts: object) -> bool:
        grown = {}
        for name, change in weights.items():
            assert isinstance(change, LowRank)
            grown[name] = LowRank(down=change.down * 1e6, up=change.up, alpha=change.alpha)
        return write_run_file(path, plan, base, grown, **facts)  # ty: ignore

    for module in (loop, exports):
        monkeypatch.setattr(module, "write_run_file", large)
    output = tmp_path / "x.safetensors"
    with pytest.raises(
        TrainingError, match=r"too large for float16.*\n.*not written; .* lower optimizer.learning_rate"
    ):
        sdlora.train(config_for(tiny_base, finished[0], output, "train.steps=3", "output.save_every=2"))
    (warning,) = (record.message for record in caplog.records if "the run goes on" in record.message)
    assert "x-000002.safetensors cannot be written (" in warning
    assert "unfinished" not in warning
    assert not list(tmp_path.glob("*.safetensors"))


TOO_HIGH, TOO_LOW = "learning_rate is probably too high", "optimizer.learning_rate is too low"


@pytest.mark.parametrize(
    ("unet", "text_encoder", "typical", "difference", "said"),
    [
        (1.0, 0.5, 0.1, 0.05, None),
        (1.0, 0.5, 0.1, None, None),
        (1.0, 0.5, 170.0, 0.9, f"170 times as large as the layer's weights: optimizer.{TOO_HIGH}"),
        (1.0, 0.5, 0.1, math.nan, f"predicts NaN or Inf: optimizer.{TOO_HIGH}"),
        (0.0, 0.0, 0.0, 0.0, f"does nothing, every change in it is zero: the run was too short (7 steps) or {TOO_LOW}"),
        (0.0, 0.5, 0.1, 0.1, "does not change the UNet, which was trained: optimizer.learning_rate is probably too low"),
        (1.0, 0.0, 0.1, 0.1, "change the text encoder, which was trained: optimizer.text_encoder_learning_rate is prob"),
        (1e-7, 1e-7, 1e-7, 1e-7, f"differ by 1.0e-07 of their size: the run was too short (7 steps) or {TOO_LOW}"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_file(
    unet: float, text_encoder: float, typical: float, difference: float | None, said: str | None
) -> None:
    parts = {
        part: PartChange(modules=1, norm=norm, relative=norm)
        for part, norm in (("unet", unet), ("text_encoder", text_encoder))
    }
    check = FileCheck(parts=parts, typical=typical, difference=difference)
    warning = check.warning(7)
    assert (said in warning) if said and warning else warning is said
    assert "NaN" not in json.dumps(check.to_json())


def test_a_run_that_does_nothing_says_so_however_short(
    tiny_base: Path, finished: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    more = ("optimizer.learning_rate=1e-12", "optimizer.text_encoder_learning_rate=1e-12", "train.steps=2")
    result = CliRunner().invoke(app, ["train", *overrides(tiny_base, finished[0], output, *more), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert "the LoRA does nothing" in answer["warning"]
    assert answer["check"]["difference"] == 0
    assert answer["check"]["parts"]["unet"]["norm"] == 0


def test_the_report_has_a_line_on_the_file(tiny_base: Path, finished: tuple[Path, Path], tmp_path: Path) -> None:
    given = overrides(tiny_base, finished[0], tmp_path / "x.safetensors", "train.steps=2")
    lines = CliRunner().invoke(app, ["train", *given]).stdout.splitlines()
    assert any("read back, it changes the UNet by " in line and "the text encoder by " in line for line in lines)
    again = CliRunner().invoke(app, ["train", *given]).stdout
    assert "read back" not in again
