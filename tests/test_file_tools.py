"""merge, resize, average, extract, bake, diff and interference on real files of tiny bases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import sdlora
from sdlora.base.checkpoint import find_base
from sdlora.cli import app
from sdlora.errors import LoraFileError
from sdlora.families import FAMILIES
from sdlora.formats.keys import resolve
from sdlora.formats.lora_file import read_lora
from sdlora.formats.lora_writer import write_lora
from sdlora.formats.published import published_modules
from sdlora.generation.loras import LoraChoice, fit_loras
from sdlora.lora.change import Change
from sdlora.lora.kinds import Decomposed, Full, Hadamard, Kronecker
from sdlora.lora.low_rank import LowRank
from sdlora.lora.stack import temporarily_applied
from tests.tiny import opened, write_tiny_base, write_tiny_ldm

pytestmark = pytest.mark.filterwarnings("ignore")
QUERY, CONV = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "unet.down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"
NORM = "unet.down_blocks.0.resnets.0.norm1"
AUTHOR = {"modelspec.trigger_phrase": "zorb", "ss_session_id": "7"}


def low_rank(shape: tuple[int, ...], rank: int, seed: int) -> LowRank:
    drawn = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=drawn) / 8
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=drawn) / 8
    return LowRank(down=down, up=up, alpha=rank / 2)


def write(path: Path, base: Path, changes: Mapping[str, Change], **metadata: str) -> Path:
    checkpoint = find_base(str(base))
    write_lora(
        path,
        changes,
        {**AUTHOR, **metadata},
        dtype=torch.float32,
        family=checkpoint.family,
        base_modules=checkpoint.module_shapes(),
    )
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of several kinds: the same modules, other ranks, alphas and kinds."""
    folder, shapes = tmp_path_factory.mktemp("loras"), find_base(str(base)).module_shapes()
    out, inner = shapes[QUERY]

    def plain(seed: int, rank: int, *names: str) -> dict[str, Change]:
        return {name: low_rank(shapes[name], rank, seed + number) for number, name in enumerate(names)}

    torch.manual_seed(3)
    loha = Hadamard(
        w1_a=torch.randn(out, 2),
        w1_b=torch.randn(2, inner),
        w2_a=torch.randn(out, 2),
        w2_b=torch.randn(2, inner),
        alpha=0.2,
    )
    lokr = Kronecker(w1=torch.randn(4, 4), w2=torch.randn(out // 4, inner // 4) / 9, alpha=1.0)
    dora = Decomposed(inner=low_rank(shapes[QUERY], 2, 9), magnitude=torch.rand(out, 1) + 0.5)
    norm = Full(diff=torch.randn(*shapes[NORM]) / 9, bias=torch.randn(*shapes[NORM]) / 9, of_norm=True)
    return {
        "a": write(folder / "a.safetensors", base, plain(1, 4, QUERY, CONV, TEXT)),
        "b": write(folder / "b.safetensors", base, plain(20, 3, QUERY, TEXT), ss_session_id="8"),
        "loha": write(folder / "loha.safetensors", base, {QUERY: loha, CONV: low_rank(shapes[CONV], 2, 5)}),
        "lokr": write(folder / "lokr.safetensors", base, {QUERY: lokr}),
        "dora": write(folder / "dora.safetensors", base, {QUERY: dora}),
        "norm": write(folder / "norm.safetensors", base, {NORM: norm, QUERY: low_rank(shapes[QUERY], 2, 6)}),
    }


def weights_with(base: Path, *choices: str) -> dict[str, Tensor]:
    """Name -> weight and bias of every touched module with the LoRAs at their weights, by the generator's own merging."""
    loaded, chosen = opened(base), [LoraChoice.parse(choice) for choice in choices]
    fitted = fit_loras(loaded.checkpoint, chosen)
    modules = loaded.modules()
    with temporarily_applied(modules, [lora.changes() for lora in fitted]):
        names = {name for lora in fitted for name in lora.fitted.modules}
        found: dict[str, Tensor] = {}
        for name in names:
            for kind in ("weight", "bias"):
                value = getattr(modules[name], kind)
                if isinstance(value, Tensor):
                    found[f"{name}.{kind}"] = value.detach().clone()
    return found


def assert_same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    "names",
    [
        ("a:0.8", "b:0.5:1.5"),
        ("a", "loha:0.7"),
        ("lokr", "b"),
        ("a:-1", "dora:0.5"),
        ("norm:0.5", "a"),
        ("a", "a"),
        ("a:0.8:lbw=OUTALL", "b:lbw=INALL"),
    ],
)
def test_concatenated_files_do_what_stacked_files_do(
    names: tuple[str, ...], base: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    choices = [":".join([str(loras[name.partition(":")[0]]), *name.split(":")[1:]]) for name in names]
    report = sdlora.merge(choices, tmp_path / "m.safetensors", base=str(base))
    assert (report.method, report.energy, report.left_out) == ("concat", 1.0, ())
    merged = weights_with(base, str(tmp_path / "m.safetensors"))
    assert_same_weights(merged, weights_with(base, *choices), atol=2e-6)
    metadata = read_lora(tmp_path / "m.safetensors").metadata
    assert metadata["modelspec.trigger_phrase"] == "zorb"
    recipe = json.loads(metadata["sdlora_merge"])["loras"]
    assert [lora["name"] for lora in recipe] == [name.partition(":")[0] for name in names]
    assert str(tmp_path) not in json.dumps(dict(metadata))


def test_low_ranks_stay_products_and_ranks_add_up(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    report = sdlora.merge([loras["a"], loras["b"]], tmp_path / "m.safetensors", base=str(base))
    assert (report.rank, report.modules, report.dtype) == ((4, 7), 3, "float32")
    whole = sdlora.merge([loras["lokr"]], tmp_path / "k.safetensors", base=str(base))
    assert whole.rank in ((0, 0), (16, 16))  # Whichever is smaller.


def test_methods_that_cut_keep_the_rank(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    for method in ("svd", "linear", "ties", "dare"):
        target = tmp_path / f"{method}.safetensors"
        report = sdlora.merge([loras["a"], loras["b"]], target, method=method, rank=2, base=str(base))  # ty: ignore
        assert (report.rank, report.modules) == ((2, 2), 3)
        assert 0.1 < report.energy < 1
    changes = {method: read_lora(tmp_path / f"{method}.safetensors").modules for method in ("svd", "ties", "dare")}
    (key,) = (key for key in changes["svd"] if key.endswith("attn1_to_q"))
    norms = {method: found[key].norm() for method, found in changes.items()}
    assert len({round(norm or 0, 4) for norm in norms.values()}) == 3
    both = [loras["a"], loras["b"]]
    sdlora.merge(both, tmp_path / "d2.safetensors", method="dare", rank=2, seed=1, base=str(base))
    assert (tmp_path / "d2.safetensors").read_bytes() != (tmp_path / "dare.safetensors").read_bytes()


def test_a_file_resized_to_its_rank_is_the_same_change(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    report = sdlora.resize(loras["a"], tmp_path / "r.safetensors", rank=4, base=str(base))
    assert (report.ranks, report.energy) == ({4: 3}, pytest.approx(1.0))
    assert_same_weights(
        weights_with(base, str(tmp_path / "r.safetensors")), weights_with(base, str(loras["a"])), atol=1e-6
    )
    assert read_lora(tmp_path / "r.safetensors").metadata["ss_network_dim"] == "4"
    smaller = sdlora.resize(loras["a"], tmp_path / "e.safetensors", energy=0.7, base=str(base))
    assert smaller.bytes_after < smaller.bytes_before
    assert smaller.energy >= 0.7
    assert max(smaller.ranks) < 4


def test_other_kinds_are_resized_to_products(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    report = sdlora.resize(loras["dora"], tmp_path / "d.safetensors", energy=1.0, base=str(base))
    assert set(read_lora(tmp_path / "d.safetensors").kinds) == {"lora"}
    assert report.energy == pytest.approx(1.0)
    assert_same_weights(
        weights_with(base, str(tmp_path / "d.safetensors")), weights_with(base, str(loras["dora"])), atol=1e-5
    )


def test_the_average_is_that_of_every_tensor(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    shapes = find_base(str(base)).module_shapes()
    other = {name: low_rank(shapes[name], 4, 50 + n) for n, name in enumerate((QUERY, CONV, TEXT))}
    second = write(tmp_path / "second.safetensors", base, other)
    report = sdlora.average([loras["a"], second], tmp_path / "mean.safetensors", base=str(base))
    assert (report.files, report.modules) == (2, 3)
    first, last, mean = (load_file(path) for path in (loras["a"], second, tmp_path / "mean.safetensors"))
    assert first.keys() == mean.keys()
    for key, tensor in mean.items():
        torch.testing.assert_close(tensor, ((first[key].double() + last[key].double()) / 2).float())
    with pytest.raises(LoraFileError, match=r"b\.safetensors: of another run than .*merge --method linear"):
        sdlora.average([loras["a"], loras["b"]], tmp_path / "no.safetensors", base=str(base))
    wider = {name: low_rank(shapes[name], 5, 9) for name in other}
    third = write(tmp_path / "third.safetensors", base, wider)
    with pytest.raises(LoraFileError, match="its kind, rank or alpha is not the same in all files"):
        sdlora.average([loras["a"], third], tmp_path / "no.safetensors", base=str(base))
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baked_file_has_the_same_tensors_and_the_stacked_weights(family: str, tmp_path: Path) -> None:
    """Names, dtypes, order of the header, unchanged bytes; q, k and v that a file keeps as one tensor included."""
    source = tmp_path / "base.safetensors"
    write_tiny_ldm(source, family)
    shapes = find_base(str(source)).module_shapes()
    names = [name for name, shape in shapes.items() if len(shape) > 1 and ("attn" in name or "conv1" in name)]
    lora = write(
        tmp_path / "l.safetensors", source, {name: low_rank(shapes[name], 2, n) for n, name in enumerate(names)}
    )
    target = tmp_path / "baked.safetensors"
    report = sdlora.bake(source, f"{lora}:0.8:0.4", target)
    assert (report.modules, report.left_out) == (len(read_lora(lora).modules), ())
    with safe_open(source, "pt") as before, safe_open(target, "pt") as after:
        assert list(before.keys()) == list(after.keys())
        changed = {key for key in before.keys() if not torch.equal(before.get_tensor(key), after.get_tensor(key))}  # noqa: SIM118
        assert all(before.get_tensor(key).dtype == after.get_tensor(key).dtype for key in changed)
        assert 0 < len(changed) <= len(names)
        assert not any("first_stage_model" in key for key in changed)
        assert json.loads(after.metadata()["sdlora_bake"])[0]["text_encoder"] == 0.4
    baked, stacked = opened(target), opened(source)
    fitted = fit_loras(stacked.checkpoint, [LoraChoice.parse(f"{lora}:0.8:0.4")])
    with temporarily_applied(stacked.modules(), [fitted[0].changes()]):
        for one, other in zip(
            (baked.unet, *baked.encoder_models()), (stacked.unet, *stacked.encoder_models()), strict=True
        ):
            for (name, tensor), (_, expected) in zip(one.named_parameters(), other.named_parameters(), strict=True):
                assert torch.equal(tensor, expected), name


def test_a_baked_folder_draws_the_stacked_image(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "baked"
    sdlora.bake(base, [f"{loras['a']}:0.8", str(loras["norm"])], target)
    given: dict[str, Any] = {"seed": 1, "steps": 2}
    stacked = sdlora.generate("a fox", base=base, loras=[f"{loras['a']}:0.8", str(loras["norm"])], **given)[0]
    baked = sdlora.generate("a fox", base=target, **given)[0]
    alone = sdlora.generate("a fox", base=base, **given)[0]
    # The folder's weights are float16, so the sums are rounded once more than on a base that was loaded in float32.
    assert (baked.latents - stacked.latents).abs().max() < 3e-4 * stacked.latents.abs().max()
    assert (alone.latents - stacked.latents).abs().max() > 1e-2 * stacked.latents.abs().max()
    assert {path.name for path in target.rglob("*")} == {path.name for path in base.rglob("*")}


def test_what_was_baked_is_extracted_again(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    sdlora.bake(base, f"{loras['norm']}:4", tmp_path / "baked")
    report = sdlora.extract(base, tmp_path / "baked", tmp_path / "x.safetensors", rank=2)
    assert (report.modules, report.rank) == (1, (2, 2))
    assert sorted(report.left_out) == [f"{NORM}.bias", f"{NORM}.weight"]
    shapes = find_base(str(base)).module_shapes()
    given = 4 * low_rank(shapes[QUERY], 2, 6).delta(torch.zeros(shapes[QUERY]))
    extracted = read_lora(tmp_path / "x.safetensors")
    (key,) = resolve(extracted.modules, shapes).matched
    found = extracted.modules[key].delta(torch.zeros(shapes[QUERY]))
    assert (found - given).norm() / given.norm() < 1e-3
    with pytest.raises(LoraFileError, match="there is nothing to extract"):
        sdlora.extract(base, base, tmp_path / "no.safetensors", rank=2)


def test_the_difference_of_files(base: Path, loras: dict[str, Path]) -> None:
    same = sdlora.diff(loras["a"], loras["a"], base=str(base))
    assert (same.same_tensors, same.only, same.metadata) == (True, ((), ()), {})
    assert [(part.part, part.modules, part.difference) for part in same.parts] == [
        ("text_encoder", 1, pytest.approx(0, abs=1e-6)),
        ("unet", 2, pytest.approx(0, abs=1e-6)),
    ]
    other = sdlora.diff(loras["a"], loras["loha"], base=str(base))
    assert other.only == ((TEXT,), ())
    assert other.sizes == (
        f"{QUERY}: lora rank 4 alpha 2, loha rank 2 alpha 0.2",
        f"{CONV}: lora rank 4 alpha 2, lora rank 2 alpha 1",
    )
    shapes = find_base(str(base)).module_shapes()
    changes = [read_lora(loras[name]) for name in ("a", "loha")]
    deltas = []
    for file in changes:
        named = {name: file.modules[key] for key, name in resolve(file.modules, shapes).matched.items()}
        deltas.append(torch.cat([named[n].delta(torch.zeros(shapes[n])).flatten() for n in (CONV, QUERY)]).double())
    (unet,) = other.parts
    cosine = torch.dot(deltas[0], deltas[1]) / (deltas[0].norm() * deltas[1].norm())
    assert unet.cosine == pytest.approx(float(cosine), abs=1e-5)
    assert unet.norms == (
        pytest.approx(float(deltas[0].norm()), rel=1e-5),
        pytest.approx(float(deltas[1].norm()), rel=1e-5),
    )
    assert unet.difference == pytest.approx(
        float((deltas[0] - deltas[1]).norm() / max(d.norm() for d in deltas)), rel=1e-5
    )


def test_interference_suggests_weights(base: Path, loras: dict[str, Path]) -> None:
    with_itself = sdlora.interference([f"{loras['a']}", f"{loras['a']}:0.5"], base=str(base))
    assert all(pair.cosine == pytest.approx(1) for pair in with_itself.pairs)
    assert all(pair.outputs == pytest.approx(1, abs=1e-5) for pair in with_itself.pairs)
    growth = 1.5 / 1.25**0.5
    assert with_itself.growth["unet.down_blocks.0"] == pytest.approx(growth)
    assert with_itself.weights[str(loras["a"])] == (pytest.approx(0.5 / growth), pytest.approx(0.5 / growth))
    apart = sdlora.interference([f"{loras['a']}", f"{loras['a']}:-1"], base=str(base))
    assert apart.growth["unet.down_blocks.0"] == pytest.approx(0, abs=1e-6)
    assert [pair.cosine for pair in apart.pairs] == [pytest.approx(-1)] * len(apart.pairs)


def test_the_command_line_answers_in_words_and_json(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    given = ("--base", base)
    out = tmp_path / "m.safetensors"
    assert "ranks 4 to 7" in run("merge", loras["a"], f"{loras['b']}:0.5", "--out", out, *given)
    assert json.loads(run("diff", out, loras["a"], *given, "--json"))["parts"][0]["part"] == "text_encoder"
    assert "modules: 3 of rank 2" in run("resize", out, tmp_path / "r.safetensors", "--rank", 2, *given)
    assert "suggested: " in run("interference", loras["a"], loras["b"], *given)
    nothing = tmp_path / "nothing.safetensors"
    run("merge", f"{loras['a']}:0", "--out", nothing, *given)
    assert "cosine undefined" in run("diff", loras["a"], nothing, *given)
    assert ": undefined " in run("interference", loras["a"], nothing, *given)
    assert "3 modules changed" in run("bake", base, loras["a"], "--out", tmp_path / "baked")
    assert "squared norm kept: 100.00%" in run(
        "extract", base, tmp_path / "baked", tmp_path / "x.safetensors", "--rank", 4
    )
    assert "the mean of 2 files" in run("average", loras["a"], loras["a"], "--out", tmp_path / "v.safetensors", *given)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loras": []}, "no LoRA file is named"),
        ({"method": "sum"}, "method 'sum': choose one of concat, svd, linear, ties, dare"),
        ({"rank": 4}, "concat is exact and cuts nothing; use --method svd"),
        (
            {"method": "svd", "rank": 0, "energy": 1.5},
            "rank 0: expected a whole number, at least 1\nenergy 1.5: expected",
        ),
        ({"method": "ties", "density": 0.0}, "density 0: expected a share above 0"),
        (
            {"loras": ["a.safetensors:1@0,0@1", "b.safetensors:1:stop=3"]},
            "b.safetensors: a start, a stop or a curve needs",
        ),
        (
            {"loras": ["missing.safetensors", "other.safetensors"]},
            "missing.safetensors: no such file\nother.safetensors",
        ),
    ],
)
def test_faults_are_said_and_nothing_is_written(
    arguments: dict[str, Any], said: str, loras: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "out.safetensors"
    given = {"loras": [loras["a"]], **arguments}
    with pytest.raises(LoraFileError) as caught:
        sdlora.merge(target=target, **given)
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_change_that_depends_on_weights_needs_the_base(tmp_path: Path) -> None:
    shapes = published_modules("sd1")
    out, inner = shapes[QUERY]
    product = LowRank(down=torch.randn(2, inner), up=torch.randn(out, 2), alpha=2.0)
    dora = Decomposed(inner=product, magnitude=torch.ones(out, 1))
    file = tmp_path / "dora.safetensors"
    metadata = {"ss_base_model_version": "sd_v1"}
    write_lora(file, {QUERY: dora}, metadata, dtype=torch.float32, family=FAMILIES["sd1"], base_modules=shapes)
    expected = "its changes of kind dora depend on the weights of the base; name it with --base"
    with pytest.raises(LoraFileError, match=expected):
        sdlora.merge(file, tmp_path / "out.safetensors")
    with pytest.raises(LoraFileError, match=expected):
        sdlora.resize(file, tmp_path / "out.safetensors", rank=1)
    assert list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_that_cannot_be_written_or_compared_is_said(
    base: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        LoraFileError, match=r"x\.safetensors: the base is a folder, and so is its copy; leave .safetens"
    ):
        sdlora.bake(base, loras["a"], tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(LoraFileError, match="mini: has the same layers as mini; there is nothing to extract"):
        sdlora.extract("mini", "mini", tmp_path / "x.safetensors", rank=1)
    write_tiny_ldm(tmp_path / "one.safetensors", "sd1")
    tensors = load_file(tmp_path / "one.safetensors")
    next(tensor for name, tensor in tensors.items() if name.endswith("attn1.to_q.weight"))[0] = torch.inf
    save_file(tensors, tmp_path / "two.safetensors")
    with pytest.raises(LoraFileError, match=r"two\.safetensors or .*one\.safetensors: unet\..* holds NaN or Inf"):
        sdlora.extract(tmp_path / "one.safetensors", tmp_path / "two.safetensors", tmp_path / "x.safetensors", rank=1)
    assert not (tmp_path / "x.safetensors").exists()
