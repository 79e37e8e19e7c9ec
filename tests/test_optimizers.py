"""Every optimizer by the one protocol: against its own class, resumed, with broken gradients, with its shapes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pytorch_optimizer import get_supported_optimizers, load_optimizer
from safetensors.torch import load_file, save_file
from torch import nn

from sdlora.config.optimizer_rules import OWN_NAMES
from sdlora.config.sections import OptimizerSection
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.optimizers.choice import ELEMENTWISE, NAMES_THERE, UNSUITABLE, choose
from sdlora.training.optimizers.library import LibraryOptimizer
from tests.full_size import META

pytestmark = pytest.mark.filterwarnings("ignore")  # Of the packages: about kernels and GPUs that are not there.

NAMES = {*OWN_NAMES, *get_supported_optimizers()} - UNSUITABLE.keys()
SHAPES = [[(4, 300), (300, 4), (20, 300)], [(4, 40), (40, 4)]]
STEPS = 12


def names() -> Iterator[object]:
    for name in sorted(NAMES):
        absent = name == "adamw8bit" and find_spec("bitsandbytes") is None
        marks = [pytest.mark.skipif(absent, reason="needs the extra quant")]
        yield pytest.param(name, marks=marks if name in (*OWN_NAMES, "came", "muon") else [*marks, pytest.mark.slow])


def section(name: str, **settings: object) -> OptimizerSection:
    return OptimizerSection(name=name, warmup_steps=3, **settings)  # ty: ignore


def parameters() -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(1)
    sizes = [sum(rows * columns for rows, columns in group) for group in SHAPES]
    return [nn.Parameter(torch.randn(size, generator=drawn) * 0.1) for size in sizes]


def guarded(name: str, **settings: object) -> tuple[GuardedAdamW, list[nn.Parameter]]:
    made = parameters()
    chosen = section(name, **settings)
    rates = [chosen.learning_rate, chosen.learning_rate / 2]
    return GuardedAdamW(made, rates, chosen, steps=100, shapes=SHAPES, seed=3), made


def give_gradients(made: list[nn.Parameter], step: int, *, broken: float | None = None) -> None:
    drawn = torch.Generator().manual_seed(100 + step)
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=drawn) * 0.01
    if broken is not None:
        assert made[1].grad is not None
        made[1].grad[3] = broken


def do_steps(optimizer: GuardedAdamW, made: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        give_gradients(made, step)
        torch.manual_seed(step if first == 0 else 77)  # What others draw must not matter.
        optimizer.step(step)


@pytest.mark.parametrize("name", list(names()))
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_killed_and_resumed_gives_the_same_bytes(name: str, ema: float, tmp_path: Path) -> None:
    if ema and (name.startswith("schedule") or name not in OWN_NAMES):
        pytest.skip("averages itself, or is no other with an average")
    optimizer, whole = guarded(name, ema=ema)
    start = [parameter.detach().clone() for parameter in whole]
    do_steps(optimizer, whole, 0, 7)
    save_file({key: tensor.contiguous() for key, tensor in optimizer.state().items()}, tmp_path / "x.safetensors")
    do_steps(optimizer, whole, 7, STEPS)
    resumed, parts = guarded(name, ema=ema)
    resumed.restore(load_file(tmp_path / "x.safetensors"))
    do_steps(resumed, parts, 7, STEPS)
    for one, other, before in zip(whole, parts, start, strict=True):
        assert one.isfinite().all()
        assert not torch.equal(one, before)
        assert torch.equal(one, other)
    states = [each.state() for each in (optimizer, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@pytest.mark.parametrize("name", list(names()))
def test_a_broken_gradient_changes_neither_parameter_nor_tensor(name: str) -> None:
    optimizer, made = guarded(name, ema=0.0 if name.startswith("schedule") else 0.9)
    do_steps(optimizer, made, 0, 4)
    before = {key: tensor.clone() for key, tensor in optimizer.state().items()}
    for step, broken in ((4, torch.nan), (5, torch.inf)):
        give_gradients(made, step, broken=broken)
        optimizer.step(step)
    after = optimizer.state()
    counts = {"skipped", "updates", *(key for key in after if key.endswith(".json"))}
    assert {key for key in after if not torch.equal(after[key], before[key])} <= counts
    assert optimizer.skipped_steps() == 2
    do_steps(optimizer, made, 6, 8)
    assert all(parameter.isfinite().all() for parameter in made)
    assert not torch.equal(made[0], before["parameter.0"])


@pytest.mark.parametrize("name", list(names()))
def test_a_first_step_that_is_broken_leaves_the_parameters(name: str) -> None:
    optimizer, made = guarded(name)
    give_gradients(made, 0, broken=torch.nan)
    optimizer.step(0)
    assert all(torch.equal(one, other) for one, other in zip(made, parameters(), strict=True))
    do_steps(optimizer, made, 1, STEPS)
    assert all(parameter.isfinite().all() for parameter in made)


@pytest.mark.parametrize("name", sorted(ELEMENTWISE - {"adamw8bit"}))
def test_shapes_mean_nothing_to_what_gets_one_flat_tensor(name: str) -> None:
    made_by = load_optimizer(NAMES_THERE.get(name, name))
    (flat, _), shapes = parameters(), SHAPES[0]
    views = [nn.Parameter(part.clone().view(shape)) for part, shape in zip(split(flat), shapes, strict=True)]
    settings = choose(section(name)).arguments
    whole, parts = made_by([flat], lr=1e-2, **settings), made_by(views, lr=1e-2, **settings)
    for step in range(15):
        flat.grad = torch.randn(flat.shape, generator=torch.Generator().manual_seed(step)) * 0.01
        for view, part in zip(views, split(flat.grad), strict=True):
            view.grad = part.clone().view(view.shape)
        whole.step()
        parts.step()
    torch.testing.assert_close(torch.cat([view.detach().flatten() for view in views]), flat.detach(), rtol=0, atol=1e-6)


def split(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return flat.detach().split([rows * columns for rows, columns in SHAPES[0]])


REFERENCES = {
    "adafactor": {"betas": (None, 0.999), "relative_step": False, "scale_parameter": False},
    "came": {},
    "lion": {},
    "prodigy": {"safeguard_warmup": True},
    "schedule-free": {},
}


@pytest.mark.parametrize("name", REFERENCES)
def test_steps_are_those_of_its_own_class(name: str) -> None:
    """Tensors of their own, clipped by torch, at the rates of the schedule; an instance for each part."""
    optimizer, made = guarded(name, max_grad_norm=0.2)
    chosen, made_by = section(name), load_optimizer(NAMES_THERE.get(name, name))
    tensors = [
        [nn.Parameter(part.view(shape).clone()) for part, shape in zip(parts, shapes, strict=True)]
        for parts, shapes in (
            (flat.detach().split([rows * columns for rows, columns in shapes]), shapes)
            for flat, shapes in zip(parameters(), SHAPES, strict=True)
        )
    ]
    theirs = [made_by([{"params": group}], lr=1.0, **REFERENCES[name]) for group in tensors]
    for step in range(25):
        give_gradients(made, step)
        for flat, group in zip(made, tensors, strict=True):
            assert flat.grad is not None
            sizes = [each.numel() for each in group]
            for each, part in zip(group, flat.grad.split(sizes), strict=True):
                each.grad = part.view(each.shape).clone()
        nn.utils.clip_grad_norm_([each for group in tensors for each in group], 0.2)
        optimizer.step(step)
        progress = torch.tensor((step - 3) / 97, dtype=torch.float64)
        factor = (step + 1) / 4 if step < 3 else (0.5 + 0.5 * torch.cos(torch.pi * progress)).item()
        factor = 1.0 if step >= 3 and name == "schedule-free" else factor
        for share, each in zip((1, 0.5), theirs, strict=True):
            each.param_groups[0]["lr"] = chosen.learning_rate * share * factor
            each.step()
    expected = [torch.cat([each.detach().flatten() for each in group]) for group in tensors]
    for one, other, start in zip(made, expected, parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=0, atol=1e-6)
        assert (other - start).abs().max() > 2e-6


def test_a_norm_of_0_is_no_limit() -> None:
    """As ``max_grad_norm`` of kohya's trainer, which clips where it is not 0."""
    trained = {}
    for most in (0, 1e30, 1e-2):
        optimizer, made = guarded("adamw", max_grad_norm=most)
        do_steps(optimizer, made, 0, 3)
        trained[most] = torch.cat([each.detach() for each in made])
    assert torch.equal(trained[0], trained[1e30])
    assert not torch.equal(trained[0], trained[1e-2])


def test_adamw_in_8_bits_is_that_of_bitsandbytes() -> None:
    library = pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    optimizer, made = guarded("adamw8bit", weight_decay=0.1, betas=(0.8, 0.95), schedule="constant", max_grad_norm=99.0)
    copies = parameters()
    theirs = [library.optim.AdamW8bit([each], betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1) for each in copies]
    for step in range(25):
        give_gradients(made, step)
        give_gradients(copies, step)
        optimizer.step(step)
        for rate, each in zip((3e-4, 1.5e-4), theirs, strict=True):
            each.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 4)
            each.step()
    assert any(tensor.dtype == torch.uint8 and tensor.numel() > 4096 for tensor in optimizer.state().values())
    for one, other in zip(made, copies, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*OWN_NAMES, "came"} - {"adamw8bit"}))
def test_stop_rates_and_loss_scale_are_the_same_for_all(name: str) -> None:
    """The second part stays after its stop; a part at rate 0 never moves; scaled gradients move as those that are not."""
    plain, scaled = parameters(), parameters()
    chosen = section(name)
    rates = [chosen.learning_rate, chosen.learning_rate]
    both = GuardedAdamW(plain, rates, chosen, steps=20, lengths=[20, 2], shapes=SHAPES)
    half = GuardedAdamW(scaled, rates, chosen, steps=20, lengths=[20, 2], shapes=SHAPES, dtype=torch.float16)
    for step in range(5):
        give_gradients(plain, step)
        give_gradients(scaled, step)
        for parameter in scaled:
            assert parameter.grad is not None
            parameter.grad *= half.scaled(torch.ones(()))
        before = plain[1].detach().clone()
        both.step(step)
        half.step(step)
        assert torch.equal(plain[1], before) == (step >= 2)
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    still, moved = parameters(), parameters()
    two = GuardedAdamW(still, [0.0, chosen.learning_rate], chosen, steps=20, shapes=SHAPES)
    do_steps(two, still, 0, 4)
    assert torch.equal(still[0], moved[0])
    assert not torch.equal(still[1], moved[1])


@pytest.mark.parametrize("name", ["adafactor", "lion", "schedule-free"])
def test_nothing_is_read_back_from_the_device(name: str) -> None:
    made = [nn.Parameter(parameter.detach().to(META)) for parameter in parameters()]
    chosen = section(name, ema=0.0 if name == "schedule-free" else 0.9)
    optimizer = GuardedAdamW(made, [1e-3, 1e-4], chosen, steps=20, shapes=SHAPES, dtype=torch.float16)
    for step in range(3):
        for parameter in made:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(step)
    with optimizer.averaged():
        pass


def test_a_step_that_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out in the second part: the step can be done again, with the same result."""
    (optimizer, made), (other, expected) = guarded("prodigy"), guarded("prodigy")
    do_steps(optimizer, made, 0, 3)
    do_steps(other, expected, 0, 4)
    before = {key: tensor.clone() for key, tensor in optimizer.state().items()}
    algorithm = optimizer._algorithm
    assert isinstance(algorithm, LibraryOptimizer)
    second = algorithm._members[1].optimizer
    step = second.step

    def fails() -> None:
        step()
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(second, "step", fails)
        with pytest.raises(torch.OutOfMemoryError):
            do_steps(optimizer, made, 3, 4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in optimizer.state().items())
    do_steps(optimizer, made, 3, 4)
    assert all(torch.equal(one, two) for one, two in zip(made, expected, strict=True))


def test_random_numbers_of_an_optimizer_depend_on_the_seed_alone() -> None:
    made = [parameters() for _ in range(3)]
    for each, seed, outside in zip(made, (1, 1, 2), (5, 6, 5), strict=True):
        optimizer = GuardedAdamW(each, [1e-2, 1e-2], section("alice"), steps=20, shapes=SHAPES, seed=seed)
        for step in range(3):
            give_gradients(each, step)
            torch.manual_seed(outside)
            optimizer.step(step)
    assert torch.equal(made[0][0], made[1][0])
    assert not torch.equal(made[0][0], made[2][0])
