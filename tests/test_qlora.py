"""Training on a quantised base is as good as on the whole one: loss on images that were not trained on, three seeds.

Takes minutes: ``pytest -m slow tests/test_qlora.py -s`` prints the table.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sdlora.lora.quantized import QUANTIZED
from sdlora.progress import Silence
from sdlora.training.validation import validation_loss
from tests.conftest import ROOT
from tests.training_runs import session_for, toml

SEEDS, STEPS, HELD_OUT = (0, 1, 2), 60, 5


def sets_of_blueprint(folder: Path) -> str:
    """Every fifth image is held out."""
    images = sorted((ROOT / "datasets" / "blueprint").glob("*.png"))
    for number, image in enumerate(images):
        place = folder / ("held" if number % HELD_OUT == 0 else "train")
        place.mkdir(exist_ok=True)
        for file in (image, image.with_suffix(".txt")):
            shutil.copy(file, place)
    held = {"images": str(folder / "held"), "role": "validation"}
    return f"data.sets={toml([{'images': str(folder / 'train')}, held])}"


def losses(sets: str, out: Path, kind: str, seed: int) -> tuple[float, float]:
    """Loss on the images held out, before and after the training."""
    session = session_for(
        Path("mini"), None, out, sets, f"base.quantization={kind}", f"train.seed={seed}", f"train.steps={STEPS}",
        "lora.rank=8", "lora.alpha=8", "train.batch_size=2", "optimizer.learning_rate=2e-3",
        "optimizer.text_encoder_learning_rate=0", "train.precision=float32",
    )  # fmt: skip
    with session.attached():
        before = validation_loss(session, Silence())
        for step in range(STEPS):
            session.step(step)
        after = validation_loss(session, Silence())
    assert before is not None
    assert after is not None
    return before, after


@pytest.mark.slow
def test_held_out_loss_is_within_two_percent_of_that_on_the_whole_base(tmp_path: Path) -> None:
    sets, table = sets_of_blueprint(tmp_path), []
    for seed in SEEDS:
        found = {kind: losses(sets, tmp_path / "x.safetensors", kind, seed) for kind in ("none", *QUANTIZED)}
        table.append(found)
        print(json.dumps({"seed": seed, **found}))
    for found in table:
        before, after = found["none"]
        assert after < 0.9 * before
        for kind in QUANTIZED:
            assert found[kind][1] == pytest.approx(after, rel=0.02)
