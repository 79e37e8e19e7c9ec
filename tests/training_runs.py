"""Short runs on the tiny base: their settings, their sessions, and the comparison of their files."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from sdlora.base.load import load_base
from sdlora.config.loading import load_config
from sdlora.config.sections import Config
from sdlora.errors import ResumeError
from sdlora.formats.safetensors_file import read_header
from sdlora.progress import Silence
from sdlora.training.optimizer import GuardedAdamW
from sdlora.training.plan import plan_config
from sdlora.training.session import TrainingSession, open_session
from tests.conftest import write_images

STEPS = 12
TIMES = {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}


def config_for(base: Path, images: Path | None, out: Path, *more: str) -> Config:
    return load_config(None, overrides(base, images, out, *more))


def overrides(base: Path, images: Path | None, out: Path, *more: str) -> list[str]:
    """Without ``images``, ``more`` names the sets."""
    return [
        *([f"data.images={images}"] if images else []), f"base.path={base}", "data.trigger=zorb",
        f"output.path={out}", f"train.steps={STEPS}",
        "train.batch_size=2", "train.save_every=2", "lora.rank=4", "optimizer.learning_rate=1e-2", "samples.prompts=[]",
        "optimizer.text_encoder_learning_rate=1e-3", *more,
    ]  # fmt: skip


def everything(folder: Path) -> list[str]:
    """Settings under which all that can be drawn is drawn, with images of each role."""
    images = {
        "images": write_images(folder / "zorbs" / "3_zorb", 5, sizes=((64, 64), (80, 48), (200, 60))),
        "others": write_images(folder / "others", 2),
        "held": write_images(folder / "held", 2, sizes=((64, 90),)),
    }
    for number in range(3):
        file = images["images"] / f"{number}.png"
        with Image.open(file) as image:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(file)
    caption = "a {red|blue} thing, on paper, {big|small}\nsomething, else, at all"
    (images["images"] / "1.txt").write_text(caption, encoding="utf-8")
    sets = [
        {"images": str(folder / "zorbs"), "repeats": 2},
        {"images": str(images["others"]), "role": "regularisation", "loss_weight": 0.5},
        {"images": str(images["held"]), "role": "validation"},
    ]
    return [
        f"data.sets={toml(sets)}", "data.caption_lines=draw", "data.wildcards=true", "data.crop=random",
        "data.shuffle_tags=true", "data.tag_dropout=0.3", "data.flip=true", "data.mask=alpha", "data.resolution=[64, 80]",
        "data.bucket_rule=kohya", "data.caption_dropout=0.2", "objective.prior_loss_weight=0.7",
        "objective.noise_offset=0.1", "objective.multires_noise_iterations=4", "objective.input_perturbation=0.1",
        "objective.timestep_sampling=logit_normal",
    ]  # fmt: skip


def toml(sets: list[dict[str, object]]) -> str:
    tables = (", ".join(f"{key} = {json.dumps(value)}" for key, value in one.items()) for one in sets)
    return "[" + ", ".join(f"{{{table}}}" for table in tables) + "]"


def same_but_for_times(one: Path, other: Path, *, ignoring: Collection[str] = ()) -> None:
    data = [file.read_bytes()[read_header(file, ResumeError).payload_start :] for file in (one, other)]
    assert data[0] == data[1]
    tables = [dict(read_header(file, ResumeError).metadata) for file in (one, other)]
    differing = {key for key in tables[0].keys() | tables[1].keys() if tables[0].get(key) != tables[1].get(key)}
    assert differing <= TIMES | {"sshs_legacy_hash", *ignoring}


def session_for(base: Path, images: Path | None, out: Path, *more: str) -> TrainingSession:
    plan = plan_config(config_for(base, images, out, *more))
    loaded = load_base(plan.base, device=torch.device("cpu"), dtype=torch.float32)
    return open_session(plan, loaded, Accelerator(), Silence())


def losses(session: TrainingSession, steps: int) -> list[float]:
    """Losses of the first steps, none of which changes a weight."""
    with session.attached(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuardedAdamW, "step", lambda *_: None)
        return [session.step(step).item() for step in range(steps)]
