"""Float16 and bfloat16 on a CUDA device against float32 on the CPU; a deterministic run, resumed, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import sdlora
from sdlora.base.device import device_facts
from sdlora.base.load import load_base
from sdlora.config.loading import load_config
from sdlora.config.sections import Config
from sdlora.progress import Silence
from sdlora.training.plan import plan_config
from sdlora.training.session import TrainingSession, open_session
from tests.training_runs import same_but_for_times

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 50


def mini_config(output: Path, *more: str) -> Config:
    settings = (
        "data.images=datasets/blueprint", "data.trigger=blupaper", f"output.path={output}", f"train.steps={STEPS}",
        "train.batch_size=2", "lora.rank=8", "samples.prompts=[]", *more,
    )  # fmt: skip
    return load_config(None, list(settings))


def trained(folder: Path, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, TrainingSession]:
    """Loss of each step, and the weights after the last, flat, both on the CPU."""
    plan = plan_config(mini_config(folder / "x.safetensors"))
    base = load_base(plan.base, device=torch.device(device), dtype=dtype)
    session = open_session(plan, base, Accelerator(), Silence())
    with session.attached():
        losses = torch.stack([session.step(step) for step in range(STEPS)])
    weights = torch.cat([parameter.detach() for parameter in session.adapter.parameters])
    return losses.cpu(), weights.cpu(), session


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    losses, weights, _ = trained(tmp_path_factory.mktemp("cpu"), "cpu", torch.float32)
    return losses, weights


@pytest.mark.parametrize(
    ("dtype", "loss", "weights"),
    [(torch.float32, 1e-2, 1e-2), (torch.float16, 1e-2, 1e-2), (torch.bfloat16, 5e-2, 5e-2)],
)
def test_mini_trains_on_cuda_as_on_the_cpu(
    dtype: torch.dtype,
    loss: float,
    weights: float,
    on_the_cpu: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
) -> None:
    """Largest relative difference of a loss, and of all weights together, after 50 steps; convolutions may use TF32."""
    expected_losses, expected = on_the_cpu
    losses, values, session = trained(tmp_path, "cuda", dtype)
    assert session.optimizer.skipped_steps() == session.optimizer.settling_steps()
    assert ((losses - expected_losses).abs() / expected_losses).max().item() < loss
    assert ((values - expected).norm() / expected.norm()).item() < weights


class Stopped(Exception):
    pass


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_a_deterministic_run_resumes_bit_for_bit(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (f"train.precision={precision}", "train.deterministic=true", "train.steps=12", "train.save_every=4")
    whole, parts = (tmp_path / name / "x.safetensors" for name in ("whole", "parts"))
    sdlora.train(mini_config(whole, *more))
    take_step = TrainingSession.step

    def stopping(self: TrainingSession, number: int) -> torch.Tensor:
        if number == 9:
            raise Stopped
        return take_step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "step", stopping)
        with pytest.raises(Stopped):
            sdlora.train(mini_config(parts, *more))
    assert sdlora.train(mini_config(parts, *more)).result.resumed_from == 8
    same_but_for_times(whole, parts)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_step_of_the_optimizer_makes_nobody_wait(precision: str, tmp_path: Path) -> None:
    plan = plan_config(mini_config(tmp_path / "x.safetensors"))
    base = load_base(plan.base, device=torch.device("cuda"), dtype=getattr(torch, precision))
    session = open_session(plan, base, Accelerator(), Silence())
    with session.attached():
        session.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        session.optimizer.scaled(torch.ones((), device="cuda"))
        session.optimizer.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_device_says_its_name_and_memory() -> None:
    device = torch.device("cuda")
    facts = device_facts(device)
    assert (facts.kind, facts.name) == ("cuda", torch.cuda.get_device_name(device))
    assert facts.free
    assert 0 < facts.free <= torch.cuda.mem_get_info(device)[1]
    assert facts.bfloat16 == (torch.cuda.get_device_capability(device)[0] >= 8)
