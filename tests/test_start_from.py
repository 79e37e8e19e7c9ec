"""Training that starts from a LoRA file: its values, what is said, and whether a run goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sdlora as package
from sdlora.base.checkpoint import find_base
from sdlora.errors import ConfigError, ResumeError
from sdlora.families import SD1, SDXL
from sdlora.formats.lora_file import read_lora
from sdlora.formats.lora_writer import write_lora
from sdlora.formats.safetensors_file import read_header
from sdlora.lora.change import Change
from sdlora.lora.kinds import Full, Hadamard
from sdlora.lora.low_rank import LowRank
from sdlora.lora.low_rank_trainable import TrainableLowRank
from sdlora.lora.started_trainable import StartedTrainable
from sdlora.lora.targets import chosen_names
from sdlora.training.new_adapter import new_adapter
from sdlora.training.plan import RunPlan, plan_config
from sdlora.training.session import TrainingSession
from tests.tiny import opened
from tests.training_runs import config_for, same_but_for_times

OUT, IN = 40, 24


def low_rank(rank: int, alpha: float, *, out: int = OUT, inner: int = IN) -> LowRank:
    return LowRank(down=torch.randn(rank, inner), up=torch.randn(out, rank), alpha=alpha)


def started(change: Change, *, rank: int, alpha: float) -> tuple[dict[str, Tensor], Tensor]:
    """Start values, and the change in float64 that they make."""
    fresh = TrainableLowRank(module=nn.Linear(IN, OUT).requires_grad_(False), rank=rank, alpha=alpha)
    values = StartedTrainable(fresh=fresh, change_of_file=change).start("unet.a", 3)
    assert {key: (tuple(v.shape), v.dtype) for key, v in values.items()} == {
        key: (shape, torch.float32) for key, shape in fresh.shapes.items()
    }
    return values, alpha / rank * values["up"].double() @ values["down"].double()


def delta(change: Change) -> Tensor:
    return change.delta(torch.zeros(OUT, IN, dtype=torch.float64))


def test_the_same_rank_and_scale_is_taken_bit_for_bit() -> None:
    change = low_rank(4, 2.0)
    values, _ = started(change, rank=4, alpha=2.0)
    assert torch.equal(values["down"], change.down)
    assert torch.equal(values["up"], change.up)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4.0), (4, 3.0), (7, 2.0), (24, 24.0)])
def test_another_alpha_and_a_higher_rank_keep_the_change(rank: int, alpha: float) -> None:
    change = low_rank(4, 2.0)
    values, ours = started(change, rank=rank, alpha=alpha)
    torch.testing.assert_close(ours, delta(change), rtol=1e-6, atol=1e-6)
    assert torch.equal(values["down"][:4], change.down)
    # What is added can learn: its down is random, as without a file, and its up is zero.
    fresh = TrainableLowRank(module=nn.Linear(IN, OUT), rank=rank, alpha=alpha).start("unet.a", 3)["down"]
    assert torch.equal(values["down"][4:], fresh[4:])
    assert not values["up"][:, 4:].any()


def test_a_lower_rank_has_the_best_of_the_change() -> None:
    change = low_rank(9, 3.0)
    values, ours = started(change, rank=4, alpha=8.0)
    u, s, vh = torch.linalg.svd(delta(change))
    torch.testing.assert_close(ours, u[:, :4] * s[:4] @ vh[:4], rtol=1e-5, atol=1e-5)
    # Both matrices have the same norms, so that neither learns faster.
    torch.testing.assert_close(values["up"].norm(dim=0), values["down"].norm(dim=1))


def test_another_kind_has_its_best_approximation() -> None:
    shapes = {"w1_a": (OUT, 2), "w1_b": (2, IN), "w2_a": (OUT, 2), "w2_b": (2, IN)}
    change = Hadamard(**{key: torch.randn(shape) for key, shape in shapes.items()}, alpha=1.0)
    _, ours = started(change, rank=4, alpha=2.0)
    # LoHa of rank 2 has at most rank 4.
    torch.testing.assert_close(ours, delta(change), rtol=1e-3, atol=1e-3)


def written(file: Path, base: Path, modules: dict[str, Change] | None = None, *, format: str = "kohya") -> Path:
    """A LoRA of rank 4 for the UNet's attention on ``base``, or of ``modules``."""
    shapes = find_base(str(base)).module_shapes()
    if modules is None:
        names = [name for name in chosen_names(shapes, "attention") if name.startswith("unet.")]
        modules = {name: low_rank(4, 8.0, out=shapes[name][0], inner=shapes[name][1]) for name in names}
    family = SDXL if any(name.startswith("text_encoder_2") for name in modules) else SD1
    write_lora(file, modules, {}, dtype=torch.float32, family=family, base_modules=shapes, format=format)
    return file


def planned(base: Path, images: Path, file: Path, *more: str) -> RunPlan:
    output = file.parent / "trained.safetensors"
    return plan_config(config_for(base, images, output, f"lora.start_from={file}", *more))


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_a_run_starts_from_a_file_of_any_format(format: str, tiny_base: Path, images: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "old.safetensors", tiny_base, format=format)
    plan = planned(tiny_base, images, file)
    assert plan.start is not None
    changes = new_adapter(opened(tiny_base), plan.config, plan.start.changes).changes()
    for name, change in changes.items():
        like = torch.zeros(*change.weight_shape, dtype=torch.float64)
        expected = plan.start.changes[name].delta(like) if name.startswith("unet.") else like
        torch.testing.assert_close(change.delta(like), expected, rtol=1e-6, atol=1e-6)
    assert len(plan.start.changes) == 32


def test_the_trained_file_starts_there(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    """At a rate near zero nothing moves: what is written is what was read."""
    file, said = written(tmp_path / "old.safetensors", tiny_base), []
    settings = ("train.steps=1", "optimizer.learning_rate=1e-12", "output.precision=float32")
    package.train(
        config_for(tiny_base, images, tmp_path / "x.safetensors", f"lora.start_from={file}", *settings), say=said.append
    )
    old, new = (read_lora(each).modules for each in (file, tmp_path / "x.safetensors"))
    for key, change in old.items():
        for name, tensor in change.tensors().items():
            torch.testing.assert_close(new[key].tensors()[name], tensor, rtol=0, atol=1e-6)
    (line,) = [line for line in said if "start from" in line]
    assert line == f"32 of 40 trained modules start from {file}; 8 trained modules are not in it and start fresh"


def test_what_happens_to_the_modules_is_said_in_one_line(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    shapes = find_base(str(tiny_base)).module_shapes()
    names = [name for name in chosen_names(shapes, "attention") if name.startswith("unet.")]
    ranks = [2, 4, 5, 6]
    modules: dict[str, Change] = {
        name: low_rank(rank, 1.0, out=shapes[name][0], inner=shapes[name][1])
        for name, rank in zip(names, ranks, strict=False)
    }
    full = torch.randn(shapes[names[4]])
    modules |= {names[4]: Full(diff=full), "unet.time_embedding.linear_1": Full(diff=torch.zeros(64, 16))}
    plan = planned(tiny_base, images, written(tmp_path / "old.safetensors", tiny_base, modules))
    (line,) = plan.start_in_words
    assert re.fullmatch(
        r"5 of 40 trained modules start from .*old\.safetensors; 1 of a lower rank are padded; 2 of a higher rank are "
        r"truncated by SVD; 1 of another kind are approximated by SVD; 35 trained modules are not in it and start fresh; "
        r"1 of its modules are not trained and are left out",
        line,
    )


def test_a_file_that_cannot_be_used_is_refused_before_the_run(
    tiny_base: Path, tiny_files: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    shapes = find_base(str(tiny_files["sdxl"])).module_shapes()
    names = [name for name in chosen_names(shapes, "attention") if name.startswith("text_encoder_2.")]
    modules: dict[str, Change] = {name: low_rank(2, 1.0, out=shapes[name][0], inner=shapes[name][1]) for name in names}
    file = written(tmp_path / "xl.safetensors", tiny_files["sdxl"], modules)
    with pytest.raises(
        ConfigError, match=r"lora\.start_from: .*xl\.safetensors: a LoRA for Stable Diffusion XL; the base"
    ):
        planned(tiny_base, images, file)
    with pytest.raises(ConfigError) as caught:
        planned(tiny_base, images, tmp_path / "none.safetensors", 'lora.targets=["unet.tok"]')
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["lora.targets", "lora.start_from"]
    with pytest.raises(ConfigError, match=r'lora\.init = "pissa" and lora\.start_from contradict each other'):
        planned(tiny_base, images, file, "lora.init=pissa")


def test_what_is_in_the_file_decides_resuming(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "old.safetensors", tiny_base)
    settings = ("train.steps=1",)
    output = tmp_path / "x.safetensors"
    package.train(config_for(tiny_base, images, output, f"lora.start_from={file}", *settings))
    moved = file.rename(tmp_path / "moved.safetensors")
    again = package.train(config_for(tiny_base, images, output, f"lora.start_from={moved}", *settings))
    assert again.result.loss is None
    assert str(tmp_path) not in str(dict(read_header(output, ResumeError).metadata))
    with pytest.raises(ResumeError, match=r"lora\.start_from was \"[0-9a-f]{64}\", is now not set"):
        package.train(config_for(tiny_base, images, output, *settings))
    written(moved, tiny_base)
    with pytest.raises(ResumeError, match=r"lora\.start_from was \"[0-9a-f]{64}\", is now \"[0-9a-f]{64}\""):
        package.train(config_for(tiny_base, images, output, f"lora.start_from={moved}", *settings))


class Stopped(Exception):
    pass


@pytest.mark.parametrize("start", ["pissa", "orthogonal", "file"])
def test_stopped_and_resumed_equals_uninterrupted(
    start: str, tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [
        '{pattern = "unet.up_blocks", rank = 6, learning_rate = 2e-3}', '{pattern = "*.to_v", train = false}',
        '{pattern = "text_encoder", alpha = 3.0}',
    ]  # fmt: skip
    begin = (
        f"lora.start_from={written(tmp_path / 'old.safetensors', tiny_base)}"
        if start == "file"
        else f"lora.init={start}"
    )
    more = [
        "train.save_every=1", "train.steps=4", "optimizer.lora_plus_ratio=4",
        "lora.targets=attention-mlp", f"lora.rules=[{', '.join(tables)}]", begin,
    ]  # fmt: skip
    whole, parts = (tmp_path / name / "x.safetensors" for name in ("whole", "parts"))
    package.train(config_for(tiny_base, images, whole, *more))
    take_step = TrainingSession.step
    for stop in (1, 3):

        def step(self: TrainingSession, number: int, stop: int = stop) -> Tensor:
            if number == stop:
                raise Stopped
            return take_step(self, number)

        monkeypatch.setattr(TrainingSession, "step", step)
        with pytest.raises(Stopped):
            package.train(config_for(tiny_base, images, parts, *more))
    monkeypatch.setattr(TrainingSession, "step", take_step)
    assert package.train(config_for(tiny_base, images, parts, *more)).result.resumed_from == 3
    same_but_for_times(whole, parts)
    metadata, ours = read_header(parts, ResumeError).metadata, read_lora(parts).modules
    factor = 1 if start == "file" else 2
    assert {change.rank for change in ours.values()} == {4 * factor, 6 * factor}
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"
    assert '"train": false' in metadata["ss_network_args"]
    assert not any(key.endswith("to_v") for key in ours)
