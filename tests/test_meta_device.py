"""The real training step at full size on the meta device: one copy, and nothing in it waits for the device.

See ``tests/full_size.py`` for what the meta device shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from sdlora.base.base import Base
from sdlora.base.conditioning import Framing
from sdlora.base.device_memory import Room
from sdlora.base.load import load_base
from sdlora.base.schedule import NoiseSchedule
from sdlora.cache.store import EncodedCache
from sdlora.progress import Silence
from sdlora.training.caption_embeddings import open_caption_embeddings
from sdlora.training.latents import EncodedImage
from sdlora.training.new_adapter import new_adapter
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.plan import RunPlan, plan_config
from sdlora.training.session import TrainingSession
from sdlora.training.step_shape import StepShape
from tests.conftest import write_images
from tests.full_size import META, Watch, full_size_base
from tests.training_runs import config_for

SIDES = {"sd1": 512, "sdxl": 1024}


def new_plan(checkpoint: Path, folder: Path, *, text_rate: float = 0) -> RunPlan:
    """Batches of two."""
    rate = f"optimizer.text_encoder_learning_rate={text_rate}"
    more = ("data.caption_dropout=0.5", "cache.disk=false", rate)
    return plan_config(config_for(checkpoint, write_images(folder / "images", 2), folder / "x.safetensors", *more))


def session_on(base: Base, plan: RunPlan, *, side: int, micro_batch: int = 2, spilled: bool = False) -> TrainingSession:
    """A session on the meta device with images of ``side`` pixels; their latents are in main memory if ``spilled``."""
    config, text_rate = plan.config, plan.config.optimizer.text_encoder_learning_rate
    latents = torch.zeros(4, side // 8, side // 8, device="cpu" if spilled else META)
    framing, mask = Framing.whole(side, side), latents[:1] if spilled else None
    image = EncodedImage(mean=latents, std=latents.clone(), framing=framing, mask=mask)
    adapter, steps = new_adapter(base, config), config.train.steps
    rates = [group.rate for group in adapter.groups]
    session = TrainingSession(
        plan=plan,
        shape=StepShape(micro_batch=micro_batch, checkpointing=False),
        base=base,
        images=dict.fromkeys(plan.training.views(steps), image),
        embeddings=open_caption_embeddings(
            base, plan.items, config, EncodedCache(None, 0), room=Room(META), ahead=None, progress=Silence()
        ),
        adapter=adapter,
        optimizer=GuardedAdamW(adapter.parameters, rates, config.optimizer, steps=steps, dtype=base.dtype),
        compiled=False,
        accelerator=Accelerator(),
    )
    if not text_rate:  # Frozen encoders compute each caption once.
        session.embeddings.encode(["", *(sample.caption for sample in plan.training.batch(0))])
    return session


@pytest.mark.parametrize(
    ("family", "text_rate", "micro_batch", "spilled"),
    [("sd1", 1e-4, 2, False), ("sd1", 0, 1, True), ("sdxl", 1e-4, 2, True), ("sdxl", 0, 2, False)],
)
def test_a_full_size_step_makes_one_copy_and_reads_nothing_back(
    tiny_files: dict[str, Path], tmp_path: Path, family: str, text_rate: float, micro_batch: int, spilled: bool
) -> None:
    plan = new_plan(tiny_files[family], tmp_path, text_rate=text_rate)
    base, side = full_size_base(tiny_files[family], torch.float16), SIDES[family]
    session = session_on(base, plan, side=side, micro_batch=micro_batch, spilled=spilled)
    with session.attached(), Watch() as watch:
        loss = session.step(0)
    assert loss.device == META
    (copied,) = watch.copied
    values_of_latents = 2 * 4 * (side // 8) ** 2
    assert copied.numel() > (4 if spilled else 2) * values_of_latents * 4


def schedule_in_main_memory(session: TrainingSession, patch: pytest.MonkeyPatch) -> TrainingSession:
    return replace(session, base=replace(session.base, schedule=NoiseSchedule.of(session.base.checkpoint.schedule)))


def norm_read_back(session: TrainingSession, patch: pytest.MonkeyPatch) -> TrainingSession:
    patch.setattr(GuardedAdamW, "step", lambda self, *_: self._parameters[0].grad.norm().item())
    return session


def branch_on_a_value(session: TrainingSession, patch: pytest.MonkeyPatch) -> TrainingSession:
    patch.setattr(GuardedAdamW, "scaled", lambda self, loss: loss if loss.isfinite() else loss * 0)
    return session


@pytest.mark.parametrize("fault", [schedule_in_main_memory, norm_read_back, branch_on_a_value])
def test_the_stand_in_finds_what_would_wait(
    tiny_files: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[TrainingSession, pytest.MonkeyPatch], TrainingSession],
) -> None:
    plan = new_plan(tiny_files["sd1"], tmp_path)
    base = load_base(plan.base, device=META, dtype=torch.float16)
    session = session_on(base, plan, side=64)
    with session.attached(), Watch() as watch:
        session.step(0)
        assert len(watch.copied) == 1
    session = fault(session, monkeypatch)
    with session.attached(), Watch(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        session.step(1)
