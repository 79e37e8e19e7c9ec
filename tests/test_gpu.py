"""What a CUDA device alone can prove: ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from sdlora.base.load import load_base
from sdlora.progress import Silence
from sdlora.training.plan import plan_config
from sdlora.training.session import open_session
from sdlora.training.steps import REPORT_EVERY
from tests.conftest import write_images
from tests.training_runs import config_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within the block, an operation that makes the host wait for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_waiting_is_found() -> None:
    value = torch.ones((), device="cuda")
    with waiting_is_an_error(), pytest.raises(RuntimeError):
        value.item()


@pytest.mark.parametrize("text_rate", ["0", "1e-4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_no_step_between_two_readings_of_the_loss_waits(
    tiny_files: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype, text_rate: str
) -> None:
    more = (
        "data.resolution=64",
        "data.caption_dropout=0.3",
        "cache.disk=false",
        "train.steps=40",
        f"optimizer.text_encoder_learning_rate={text_rate}",
    )
    plan = plan_config(
        config_for(tiny_files[family], write_images(tmp_path / "set", 4), tmp_path / "x.safetensors", *more)
    )
    base = load_base(plan.base, device=torch.device("cuda"), dtype=dtype)
    session = open_session(plan, base, Accelerator(), Silence())
    losses = torch.zeros(REPORT_EVERY, device="cuda")
    with session.attached():
        for step in range(REPORT_EVERY):  # Kernels are loaded and every caption is encoded.
            session.step(step)
        torch.cuda.synchronize()
        with waiting_is_an_error():
            for step in range(REPORT_EVERY):
                losses[step] = session.step(REPORT_EVERY + step)
    assert losses.isfinite().all()
    assert losses.min() > 0
