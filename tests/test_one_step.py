"""One whole step of a run equals that of peft and of lycoris-lora on diffusers' UNet, from the same start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from sdlora.base.base import Base
from sdlora.lora.change import Change
from sdlora.lora.kinds import Decomposed
from sdlora.lora.low_rank import LowRank
from sdlora.training import session as sessions
from sdlora.training.loss import denoising_loss
from sdlora.training.session import TrainingSession
from tests.training_runs import session_for

Tensors = dict[str, dict[str, Tensor]]
RANK, ALPHA, RATE = 3, 1.5, 1.0
PLAIN = (
    *(
        "optimizer.name=sgd",
        f"optimizer.learning_rate={RATE}",
        "optimizer.warmup_steps=0",
        "optimizer.schedule=constant",
    ),
    *("optimizer.text_encoder_learning_rate=0", "optimizer.max_grad_norm=1000"),
    *(
        "objective.min_snr_gamma=0",
        "train.batch_size=2",
        "train.precision=float32",
        f"lora.rank={RANK}",
        f"lora.alpha={ALPHA}",
    ),
)
pytestmark = pytest.mark.filterwarnings("ignore")  # Of peft and lycoris: about what they do not find.


def started(kind: str, base: Path, images: Path, out: Path) -> TrainingSession:
    """A session whose layers change something."""
    session = session_for(base, images, out, f"lora.kind={kind}", *PLAIN)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in session.adapter.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=drawn)
    session.adapter.begin_step()
    return session


def tensors_of(changes: dict[str, Change]) -> Tensors:
    """Module -> the trained tensors by their names in files."""
    return {name: {role: t.clone() for role, t in change.tensors().items()} for name, change in changes.items()}


def one_step(session: TrainingSession, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[Any, ...], float]:
    """Do the first step; returns what the UNet was trained on, and the loss."""
    seen: list[tuple[Any, ...]] = []

    def noting(base: Base, latents: Tensor, noise: Tensor, steps: Tensor, text: Any, *rest: Any, **more: Any) -> Tensor:
        seen.append((latents.clone(), noise.clone(), steps.clone(), text.context.clone()))
        return denoising_loss(base, latents, noise, steps, text, *rest, **more)

    monkeypatch.setattr(sessions, "denoising_loss", noting)
    with session.attached():
        loss = session.step(0).item()
    (only,) = seen
    return only, loss


def their_loss(unet: Callable[..., Any], base: Path, seen: tuple[Any, ...]) -> Tensor:
    """The mean squared error of the predicted noise, as the example scripts of diffusers have it."""
    latents, noise, timesteps, context = seen
    scheduler = DDIMScheduler.from_pretrained(base, subfolder="scheduler")
    predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, context).sample
    return torch.nn.functional.mse_loss(predicted, noise)


def stepped(tensors: dict[str, dict[str, nn.Parameter]], loss: Tensor) -> Tensors:
    """The tensors after a step of plain gradient descent."""
    loss.backward()
    after: Tensors = {}
    for name, own in tensors.items():
        after[name] = {}
        for role, parameter in own.items():
            assert parameter.grad is not None
            after[name][role] = (parameter - RATE * parameter.grad).detach()
    return after


def equal(ours: Tensors, theirs: Tensors, before: Tensors) -> None:
    moved = 0.0
    assert ours.keys() == theirs.keys()
    for name, tensors in ours.items():
        for role, tensor in tensors.items():
            other = theirs[name][role].reshape(tensor.shape)
            torch.testing.assert_close(
                tensor, other, rtol=1e-6, atol=1e-6, msg=lambda text, at=(name, role): f"{at}: {text}"
            )
            moved = max(moved, (tensor - before[name][role]).abs().max().item())
    assert moved > 1e-3, "the step is far larger than what may differ"


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_step_of_a_run_is_that_of_peft(
    kind: str, images: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    session = started(kind, tiny_base, images, tmp_path / "x.safetensors")
    changes = session.adapter.changes()
    before = tensors_of(changes)
    names = [name.removeprefix("unet.") for name in changes]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, use_dora=kind == "dora")  # ty: ignore
    unet: Any = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet").requires_grad_(False)
    theirs: Any = get_peft_model(unet, config)
    trained: dict[str, dict[str, nn.Parameter]] = {}
    for name, change in changes.items():
        layer = theirs.base_model.model.get_submodule(name.removeprefix("unet."))
        inner = change.inner if isinstance(change, Decomposed) else change
        assert isinstance(inner, LowRank)
        assert inner.alpha == ALPHA
        own = {"lora_down.weight": layer.lora_A["default"].weight, "lora_up.weight": layer.lora_B["default"].weight}
        if kind == "dora":
            own["dora_scale"] = layer.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            for role, parameter in own.items():
                parameter.copy_(before[name][role].reshape(parameter.shape))
        trained[name] = own
    seen, loss = one_step(session, monkeypatch)
    reference = their_loss(theirs, tiny_base, seen)
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    equal(tensors_of(session.adapter.changes()), stepped(trained, reference), before)


@pytest.mark.parametrize("kind", ["locon", "loha", "lokr"])
def test_a_step_of_a_run_is_that_of_lycoris(
    kind: str, images: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    made_by: Any = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}[kind]
    session = started(kind, tiny_base, images, tmp_path / "x.safetensors")
    changes = session.adapter.changes()
    before = tensors_of(changes)
    unet: Any = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet").requires_grad_(False)
    trained: dict[str, dict[str, nn.Parameter]] = {}
    for name, tensors in before.items():
        layer = made_by("x", unet.get_submodule(name.removeprefix("unet.")), 1.0, RANK, ALPHA)
        leaves = dict(layer.named_parameters())
        with torch.no_grad():
            for role, tensor in tensors.items():
                leaves[role].copy_(tensor.reshape(leaves[role].shape))
        trained[name] = {role: leaves[role] for role in tensors}
        layer.apply_to()
    if kind == "locon":
        assert any(tensors["lora_down.weight"].shape[2:] == (3, 3) for tensors in before.values())
    seen, loss = one_step(session, monkeypatch)
    reference = their_loss(unet, tiny_base, seen)
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    equal(tensors_of(session.adapter.changes()), stepped(trained, reference), before)
