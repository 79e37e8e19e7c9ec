"""Parts of a batch, one after another: the gradients and losses of the whole batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from sdlora.base.load import load_base
from sdlora.progress import Silence
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.plan import plan_config
from sdlora.training.session import TrainingSession, open_session
from tests.training_runs import config_for, everything


def gradients(session: TrainingSession, step: int) -> tuple[torch.Tensor, list[torch.Tensor], list[list[int]]]:
    """Loss and gradients of ``step``, and the timesteps of every call of the UNet."""
    calls = []
    hook = session.base.unet.register_forward_pre_hook(lambda _, given: calls.append(given[1].tolist()))
    with session.attached(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuardedAdamW, "step", lambda *_: None)
        loss = session.step(step)
    hook.remove()
    return loss, [parameter.grad.clone() for parameter in session.adapter.parameters], calls


@pytest.mark.parametrize(("family", "text_rate"), [("sd1", "1e-3"), ("sdxl", "0")])
def test_four_at_once_are_four_times_one(
    tiny_files: dict[str, Path], tmp_path: Path, family: str, text_rate: str
) -> None:
    """The models compute in float64 for the narrow bound: in float32, matrix products of other sizes round otherwise."""
    rate = f"optimizer.text_encoder_learning_rate={text_rate}"
    more = (*everything(tmp_path), "train.batch_size=4", "cache.disk=false", rate)
    plan = plan_config(config_for(tiny_files[family], None, tmp_path / "x.safetensors", *more))
    step = next(step for step in range(12) if len(plan.training.batch(step)) == 4)
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        base = load_base(plan.base, device=torch.device("cpu"), dtype=dtype)
        session = open_session(plan, base, Accelerator(), Silence())
        with torch.no_grad():  # Up matrices start at zero, and down matrices would have no gradients.
            for parameter in session.adapter.parameters:
                parameter.add_(0.05 * torch.randn_like(parameter))
        loss, expected, (whole,) = gradients(session, step)
        for size, batches in ((1, [1, 1, 1, 1]), (3, [3, 1]), (9, [4])):
            parts = replace(session, shape=replace(session.shape, micro_batch=size))
            found, accumulated, calls = gradients(parts, step)
            assert [len(timesteps) for timesteps in calls] == batches
            assert [timestep for timesteps in calls for timestep in timesteps] == whole
            assert found.item() == pytest.approx(loss.item(), rel=1e-6)
            for ours, theirs in zip(accumulated, expected, strict=True):
                assert ours.dtype == torch.float32
                assert torch.linalg.vector_norm(ours - theirs) <= bound * torch.linalg.vector_norm(theirs)
                assert size != 9 or torch.equal(ours, theirs)
