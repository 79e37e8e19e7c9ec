"""Training on a tiny base: exact resumption, interrupts, several processes, and what the file says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

import sdlora as package
from sdlora.base.encode import Conditioning, Framing
from sdlora.base.load import load_base
from sdlora.config import Config, load_config
from sdlora.data.images import as_pixels, open_picture, place
from sdlora.errors import BaseModelError, ConfigError, DataError, ResumeError, TrainingError
from sdlora.formats.safetensors_file import read_header
from sdlora.progress import Silence
from sdlora.training.loss import denoising_loss
from sdlora.training.optim import GuardedAdamW
from sdlora.training.plan import plan_run
from sdlora.training.session import TrainingSession, open_session
from sdlora.training.validation import validation_loss
from tests.conftest import write_pictures

STEPS = 12
TIMES = {"ss_training_started_at", "ss_training_finished_at", "modelspec.date"}
Run = Callable[..., subprocess.CompletedProcess[str]]


def config_for(base: Path, pictures: Path | None, out: Path, *more: str) -> Config:
    return load_config(None, overrides(base, pictures, out, *more))


def overrides(base: Path, pictures: Path | None, out: Path, *more: str) -> list[str]:
    """Without ``pictures``, ``more`` names the sets."""
    return [
        *([f"data.images={pictures}"] if pictures else []), f"base.path={base}", "data.trigger=zorb",
        f"output.path={out}", f"train.steps={STEPS}",
        "train.batch_size=2", "train.save_every=2", "lora.rank=4", "train.learning_rate=1e-2", "output.samples=[]",
        "train.text_encoder_learning_rate=1e-3", *more,
    ]  # fmt: skip


def everything(folder: Path) -> list[str]:
    """Settings under which all that can be drawn is drawn, with pictures of each role."""
    pictures = {
        "pictures": write_pictures(folder / "zorbs" / "3_zorb", 5, sizes=((64, 64), (80, 48), (200, 60))),
        "others": write_pictures(folder / "others", 2),
        "held": write_pictures(folder / "held", 2, sizes=((64, 90),)),
    }
    for number in range(3):
        file = pictures["pictures"] / f"{number}.png"
        with Image.open(file) as picture:
            picture.putalpha(Image.linear_gradient("L").resize(picture.size))
            picture.save(file)
    caption = "a {red|blue} thing, on paper, {big|small}\nsomething, else, at all"
    (pictures["pictures"] / "1.txt").write_text(caption, encoding="utf-8")
    sets = [
        {"images": str(folder / "zorbs"), "repeats": 2},
        {"images": str(pictures["others"]), "role": "regularisation", "loss_weight": 0.5},
        {"images": str(pictures["held"]), "role": "validation"},
    ]
    return [
        f"data.sets={toml(sets)}", "data.caption_lines=draw", "data.wildcards=true", "data.crop=random",
        "data.shuffle_tags=true", "data.tag_dropout=0.3", "data.flip=true", "data.mask=alpha", "data.resolution=[64, 80]",
        "data.bucket_rule=kohya", "train.caption_dropout=0.2", "train.prior_loss_weight=0.7",
    ]  # fmt: skip


def toml(sets: list[dict[str, object]]) -> str:
    tables = (", ".join(f"{key} = {json.dumps(value)}" for key, value in one.items()) for one in sets)
    return "[" + ", ".join(f"{{{table}}}" for table in tables) + "]"


def same_but_for_times(one: Path, other: Path) -> None:
    data = [file.read_bytes()[read_header(file, ResumeError).payload_start :] for file in (one, other)]
    assert data[0] == data[1]
    tables = [dict(read_header(file, ResumeError).metadata) for file in (one, other)]
    differing = {key for key in tables[0].keys() | tables[1].keys() if tables[0].get(key) != tables[1].get(key)}
    assert differing <= TIMES | {"sshs_legacy_hash"}


@pytest.fixture(scope="module")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(pictures, output) of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    pictures = write_pictures(folder / "pictures", 5, sizes=((64, 64), (80, 48)))
    package.train(config_for(tiny_base, pictures, folder / "x.safetensors"), show_progress=False)
    return pictures, folder / "x.safetensors"


def test_file_holds_every_module_and_the_change_is_not_zero(finished: tuple[Path, Path], tiny_base: Path) -> None:
    report = package.inspect(finished[1])
    assert report.modules == {"unet": 32, "text_encoder": 8, "text_encoder_2": 0}
    assert (report.family, report.dialect, report.trigger, report.problems) == ("sd1", "kohya", ("zorb",), ())
    assert report.rank
    assert report.rank.min == report.rank.max == 4
    assert report.norm
    assert min(report.norm.values()) > 0.01
    metadata = report.metadata
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"]
    assert [buckets[i] for i in "01"] == [{"resolution": [64, 64], "count": 3}, {"resolution": [80, 48], "count": 2}]
    assert metadata["ss_steps"] == str(STEPS)
    assert str(tiny_base.parent) not in json.dumps(metadata)


def test_a_finished_run_does_nothing_and_a_changed_one_is_refused(finished: tuple[Path, Path], tiny_base: Path) -> None:
    pictures, output = finished
    before = output.stat().st_mtime_ns
    assert package.train(config_for(tiny_base, pictures, output), show_progress=False).result.loss is None
    with pytest.raises(ResumeError, match=r"train\.seed was 0, is now 5"):
        package.train(config_for(tiny_base, pictures, output, "train.seed=5"), show_progress=False)
    assert output.stat().st_mtime_ns == before


def test_the_same_run_again_gives_the_same_tensors(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    package.train(config_for(tiny_base, finished[0], tmp_path / "x.safetensors"), show_progress=False)
    same_but_for_times(finished[1], tmp_path / "x.safetensors")


def test_killed_and_resumed_equals_uninterrupted(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    command = [sys.executable, "-m", "sdlora.cli", "train", *overrides(tiny_base, finished[0], output), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "x.resume" / "step-00000004.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not output.exists()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(result.stdout)
    assert 4 <= told["resumed_from"] < STEPS
    assert told["validation_loss"] is None
    assert not checkpoint.parent.exists()
    same_but_for_times(finished[1], output)


def test_ctrl_c_saves_and_says_so(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    more = ("train.steps=100000", "train.save_every=100000")
    command = [sys.executable, "-m", "sdlora.cli", "train", *overrides(tiny_base, finished[0], output, *more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Training has begun when the process has used its processors for a while after the imports.
    time.sleep(15)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in errors
    assert list((tmp_path / "x.resume").glob("step-*.safetensors"))
    assert not output.exists()


def test_damaged_checkpoints_are_passed_over(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    folder = tmp_path / "x.resume"
    folder.mkdir()
    (folder / "step-00000008.safetensors").write_bytes(b"torn")
    assert package.train(config_for(tiny_base, finished[0], output), show_progress=False).result.resumed_from == 0
    same_but_for_times(finished[1], output)


def test_two_processes_train_what_one_trains(tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sdlora.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    more = ("train.precision=float32", *everything(tmp_path))
    subprocess.run(
        [sys.executable, *launch, "train", *overrides(tiny_base, None, output, *more)],
        check=True, capture_output=True, env=environment, timeout=300,
    )  # fmt: skip
    alone = tmp_path / "alone.safetensors"
    package.train(config_for(tiny_base, None, alone, *more), show_progress=False)
    measured = [float(read_header(file, ResumeError).metadata["sdlora_validation_loss"]) for file in (alone, output)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-2)
    one, two = load_file(alone), load_file(output)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key].float(), two[key].float(), rtol=2e-2, atol=2e-3)


def test_frozen_text_encoder_is_left_out(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    more = ("train.text_encoder_learning_rate=0", "train.caption_dropout=0.5")
    package.train(config_for(tiny_base, finished[0], output, *more), show_progress=False)
    report = package.inspect(output)
    assert report.modules == {"unet": 32, "text_encoder": 0, "text_encoder_2": 0}
    assert report.metadata["ss_text_encoder_lr"] == "None"


def test_a_run_that_diverges_stops_and_writes_nothing(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    more = ("train.learning_rate=0.99", "train.max_grad_norm=1e30", "lora.alpha=1e30", "train.warmup_steps=0")
    with pytest.raises(TrainingError, match=r"lower train\.learning_rate"):
        package.train(config_for(tiny_base, finished[0], output, *more), show_progress=False)
    assert not output.exists()


def test_faults_are_found_before_a_model_is_loaded(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sdlora.training.loop.load_base", refuse)
    output = tmp_path / "x.safetensors"
    with pytest.raises(DataError):
        package.train(config_for(tiny_base, tmp_path / "none", output), show_progress=False)
    with pytest.raises(BaseModelError, match="no such base"):
        package.train(config_for(tmp_path / "none", finished[0], output), show_progress=False)
    rates = ("train.learning_rate=0", "train.text_encoder_learning_rate=0")
    with pytest.raises(ConfigError, match="nothing would be trained"):
        package.train(config_for(tiny_base, finished[0], output, *rates), show_progress=False)


def test_pictures_of_other_shapes_get_buckets_of_their_own(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "set", 6, sizes=((300, 300), (400, 250), (100, 190)))
    config = load_config(None, [f"data.images={pictures}", "data.trigger=zorb", "output.path=x.safetensors"])
    plan = plan_run(config)
    assert {(p.width, p.height) for p in plan.placements} == {(128, 128), (160, 96), (96, 160)}
    assert len(plan.batches.buckets) == 3


def session_for(base: Path, pictures: Path | None, out: Path, *more: str) -> TrainingSession:
    plan = plan_run(config_for(base, pictures, out, *more))
    loaded = load_base(plan.base, device=torch.device("cpu"), dtype=torch.float32)
    return open_session(plan, loaded, Accelerator(), Silence())


def losses(session: TrainingSession, steps: int) -> list[float]:
    """Of the first steps, none of which changes anything."""
    with session.attached(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuardedAdamW, "step", lambda *_: None)
        return [session.step(step).item() for step in range(steps)]


class Stopped(Exception):
    pass


def test_stopped_at_any_step_and_resumed_with_everything_on(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*everything(tmp_path), "train.save_every=1"]
    whole, parts = (tmp_path / name / "x.safetensors" for name in ("whole", "parts"))
    first = package.train(config_for(tiny_base, None, whole, *more), show_progress=False).result
    take_step = TrainingSession.step
    for stop in (1, 4, 9):

        def step(self: TrainingSession, number: int, stop: int = stop) -> torch.Tensor:
            if number == stop:
                raise Stopped
            return take_step(self, number)

        monkeypatch.setattr(TrainingSession, "step", step)
        with pytest.raises(Stopped):
            package.train(config_for(tiny_base, None, parts, *more), show_progress=False)
    monkeypatch.setattr(TrainingSession, "step", take_step)
    last = package.train(config_for(tiny_base, None, parts, *more), show_progress=False).result
    assert last.resumed_from == 9
    same_but_for_times(whole, parts)
    assert first.validation_loss == last.validation_loss
    assert first.validation_loss
    metadata = read_header(parts, ResumeError).metadata
    assert float(metadata["sdlora_validation_loss"]) == first.validation_loss
    assert str(tmp_path) not in json.dumps(dict(metadata))


def test_a_cached_run_is_the_same_to_the_bit_and_encodes_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = json.dumps(str(tmp_path / "cache"))
    more = [*everything(tmp_path), f"cache.folder={folder}", "train.steps=5", "train.text_encoder_learning_rate=0"]
    outputs = [tmp_path / name / "x.safetensors" for name in ("bare", "filling", "filled")]
    package.train(config_for(tiny_base, None, outputs[0], *more, "cache.disk=false"), show_progress=False)
    assert not (tmp_path / "cache").exists()
    package.train(config_for(tiny_base, None, outputs[1], *more), show_progress=False)

    def refuse(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("sdlora.training.latents.encode_pixels", refuse)
    monkeypatch.setattr("sdlora.training.contexts.encode_prompts", refuse)
    package.train(config_for(tiny_base, None, outputs[2], *more), show_progress=False)
    for other in outputs[1:]:
        same_but_for_times(outputs[0], other)


def test_where_encodings_are_kept_is_no_part_of_a_run(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    pictures, output = finished
    for more in (["cache.disk=false"], ["cache.max_gigabytes=1", f"cache.folder={json.dumps(str(tmp_path))}"]):
        assert package.train(config_for(tiny_base, pictures, output, *more), show_progress=False).result.loss is None
    sets = [{"images": str(pictures)}]
    again = config_for(tiny_base, None, output, f"data.sets={toml(sets)}")
    assert package.train(again, show_progress=False).result.loss is None
    for more in ("data.flip=true", "data.crop=random", "data.keep_tokens=2", "data.bucket_rule=kohya"):
        with pytest.raises(ResumeError, match=more.partition("=")[0]):
            package.train(config_for(tiny_base, pictures, output, more), show_progress=False)
    with pytest.raises(ResumeError, match=r"data\.sets"):
        package.train(
            config_for(tiny_base, None, output, f"data.sets={toml([{**sets[0], 'repeats': 2}])}"), show_progress=False
        )


def test_validation_pictures_change_nothing_and_are_measured_alike_each_time(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    held = write_pictures(tmp_path / "held", 3, sizes=((64, 64), (60, 100)))
    sets = toml([{"images": str(finished[0])}, {"images": str(held), "role": "validation"}])
    output = tmp_path / "x.safetensors"
    result = package.train(config_for(tiny_base, None, output, f"data.sets={sets}"), show_progress=False).result
    one, other = load_file(finished[1]), load_file(output)
    assert all(torch.equal(one[name], other[name]) for name in one)
    metadata = read_header(output, ResumeError).metadata
    assert (metadata["ss_num_train_images"], metadata["ss_num_validation_images"]) == ("5", "3")
    assert json.loads(metadata["ss_dataset_dirs"]) == {"pictures": {"n_repeats": 1, "img_count": 5}}

    session = session_for(tiny_base, None, tmp_path / "y.safetensors", f"data.sets={sets}")
    with session.attached():
        untrained = [validation_loss(session, Silence()) for _ in range(2)]
    assert untrained[0] == untrained[1]
    assert result.validation_loss
    assert untrained[0] != result.validation_loss
    assert "sdlora_validation_loss" not in read_header(finished[1], ResumeError).metadata


def test_masks_weigh_the_squared_errors(tiny_base: Path, tmp_path: Path) -> None:
    """Against the formula in float64 on the UNet's own answer."""
    session = session_for(tiny_base, write_pictures(tmp_path / "set", 2), tmp_path / "x.safetensors")
    base, rng = session.base, np.random.default_rng(0)
    shape = next(iter(session.pictures.values())).mean.shape
    latents, noise = (torch.from_numpy(rng.standard_normal((2, *shape), dtype=np.float32)) for _ in range(2))
    masks = torch.from_numpy(rng.random((2, 1, *shape[1:]), dtype=np.float32))
    masks[1, :, :2] = 0
    timesteps, framings = torch.tensor([100, 700]), [Framing.whole(64, 64)] * 2
    conditioning = session.contexts.of(["a", "b"])

    def loss(masks: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
        return denoising_loss(
            base, latents, noise, timesteps, conditioning, framings, min_snr_gamma=5.0, masks=masks
        ).detach()

    signal = base.schedule.alphas_cumprod.double()[timesteps].view(2, 1, 1, 1)
    noisy = signal.sqrt() * latents.double() + (1 - signal).sqrt() * noise.double()
    with torch.no_grad():
        predicted = base.unet(noisy.float(), timesteps, conditioning.context, return_dict=False)[0].double()
    snr = (signal / (1 - signal)).flatten()
    weight = snr.clamp(max=5) / snr
    squares = (predicted - noise.double()).square()
    expected = weight * (squares * masks.double()).mean((1, 2, 3))
    torch.testing.assert_close(loss(masks, noise).double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(loss(torch.ones_like(masks), noise), loss(None, noise))
    assert not loss(torch.zeros_like(masks), noise).any()
    # What lies outside the mask counts for nothing.
    only = torch.zeros_like(masks)
    only[:, :, 3, 4] = 1
    expected = weight * squares[:, :, 3, 4].sum(1) / squares[0].numel()
    torch.testing.assert_close(loss(only, noise).double(), expected, rtol=1e-4, atol=1e-6)


def test_masks_follow_the_view(tiny_base: Path, tmp_path: Path) -> None:
    more = ("data.mask=alpha", "data.flip=true", "data.crop=random", "train.steps=40", "data.enable_bucket=false")
    pictures = write_pictures(tmp_path / "set", 1, sizes=((128, 64),))
    shape = np.zeros((64, 128), np.uint8)
    shape[:32, :64] = 255
    with Image.open(pictures / "0.png") as picture:
        picture.putalpha(Image.fromarray(shape))
        picture.save(pictures / "0.png")
    session = session_for(tiny_base, pictures, tmp_path / "x.safetensors", *more)
    cell, seen = session.base.checkpoint.latent_factor, set()
    for view, cached in session.pictures.items():
        left = view.placement.left
        expected = shape[:, left : left + 64] / 255
        expected = expected[:, ::-1] if view.flipped else expected
        expected = expected.reshape(64 // cell, cell, 64 // cell, cell).mean((1, 3))
        assert cached.mask is not None
        np.testing.assert_allclose(cached.mask[0].numpy(), expected, atol=1e-6)
        seen.add((left, view.flipped))
    assert seen == {(left, flipped) for left in (0, 16, 32, 48, 64) for flipped in (False, True)}
    unmasked = session_for(
        tiny_base, pictures, tmp_path / "x.safetensors", *more[1:], "data.alpha_background='#ffffff'"
    )
    assert all(cached.mask is None for cached in unmasked.pictures.values())
    masked, plain = losses(session, 3), losses(unmasked, 3)
    assert all(0 < one < other for one, other in zip(masked, plain, strict=True))


def test_masks_out_of_files(tiny_base: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "set", 2)
    levels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    (pictures / "mask").mkdir()
    Image.fromarray(levels).save(pictures / "mask" / "1.png")
    more = ("data.mask=files", "train.batch_size=2")
    session = session_for(tiny_base, pictures, tmp_path / "x.safetensors", *more)
    bare, masked = (session.pictures[view].mask for view in session.plan.training.views(2))
    assert bare is None
    assert masked is not None
    side = 64 // session.base.checkpoint.latent_factor
    expected = (levels / 255).reshape(side, 64 // side, side, 64 // side).mean((1, 3))
    np.testing.assert_allclose(masked[0].numpy(), expected, atol=1e-6)
    both = session.masks(list(session.pictures.values()))
    assert both is not None
    assert torch.equal(both[0], torch.ones_like(both[0]))
    assert losses(session, 1)[0] > 0


def test_a_dataset_configuration_of_kohyas_trainer_is_trained(tiny_base: Path, tmp_path: Path) -> None:
    for name, count in (("mine", 3), ("cats", 4)):
        write_pictures(tmp_path / name, count, sizes=((64, 64), (100, 60)))
    (tmp_path / "dataset.toml").write_text(
        f"""
        [general]
        shuffle_caption = true
        caption_extension = ".txt"
        [[datasets]]
        resolution = 64
        batch_size = 2
        enable_bucket = true
        min_bucket_reso = 48
        max_bucket_reso = 96
        bucket_reso_steps = 16
        [[datasets.subsets]]
        image_dir = {json.dumps(str(tmp_path / "mine"))}
        num_repeats = 5
        flip_aug = true
        [[datasets.subsets]]
        image_dir = {json.dumps(str(tmp_path / "cats"))}
        is_reg = true
        flip_aug = true
        """,
        encoding="utf-8",
    )
    output = tmp_path / "x.safetensors"
    config = config_for(tiny_base, None, output, f"data.dataset_config={json.dumps(str(tmp_path / 'dataset.toml'))}")
    plan = plan_run(config)
    assert [(own.min_size, own.max_size, own.step) for own in plan.rules] == [(48, 96, 16)]
    assert plan.batches.batch_size == 2
    assert sum(plan.batches.repeats) == 30
    package.train(config, show_progress=False)
    metadata = read_header(output, ResumeError).metadata
    assert metadata["ss_num_train_images"] == "15"
    assert (metadata["ss_flip_aug"], metadata["ss_shuffle_caption"]) == ("True", "True")
    assert metadata["ss_total_batch_size"] == "2"


def test_embeddings_that_are_kept_are_bounded(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.training.contexts.KEPT_BYTES", 0)
    monkeypatch.setattr("sdlora.training.contexts.WRITTEN_BYTES", 20_000)
    more = (f"cache.folder={json.dumps(str(tmp_path / 'cache'))}", "train.text_encoder_learning_rate=0")
    session = session_for(tiny_base, write_pictures(tmp_path / "set", 1), tmp_path / "x.safetensors", *more)
    captions = [f"thing {number}" for number in range(80)]
    first, again = (session.contexts.of(captions).context for _ in range(2))
    assert torch.equal(first, again)
    written = sum(1 for _ in (tmp_path / "cache").rglob("*.safetensors")) - 1  # Less the picture's.
    assert written == 20_000 // first[0].nbytes
    assert written > 0


def test_flipped_views_are_mirrored_pictures(tiny_base: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "set", 1, sizes=((96, 64),))
    more = ("data.flip=true", "train.steps=30", "data.enable_bucket=false", "data.crop=random", "cache.disk=false")
    session = session_for(tiny_base, pictures, tmp_path / "x.safetensors", *more)
    with Image.open(pictures / "0.png") as picture:
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(pictures / "0.png")
    mirrored = session_for(tiny_base, pictures, tmp_path / "x.safetensors", *more)
    for view, cached in session.pictures.items():
        (twin,) = (
            other for own, other in mirrored.pictures.items() if own.left == view.left and own.flipped != view.flipped
        )
        torch.testing.assert_close(cached.mean, twin.mean, rtol=1e-4, atol=1e-4)
        assert cached.framing == twin.framing
    assert len({cached.framing.left for cached in session.pictures.values()}) == 5


def test_views_of_a_picture_are_cut_from_one_decoding(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlora.training import latents

    pictures = write_pictures(tmp_path / "set", 2, sizes=((400, 130),))
    more = ("data.flip=true", "data.crop=random", "train.steps=60", "data.enable_bucket=false", "cache.disk=false")
    opened: list[Path] = []

    def counting(file: Path, background: str) -> Image.Image:
        opened.append(file)
        return open_picture(file, background)

    monkeypatch.setattr(latents, "open_picture", counting)
    plan = plan_run(config_for(tiny_base, pictures, tmp_path / "x.safetensors", *more))
    base = load_base(plan.base, device=torch.device("cpu"), dtype=torch.float32)
    views = plan.training.views(60)
    assert len(views) == 20
    jobs = latents.latent_jobs(base, plan.items, views, plan.config)
    with ThreadPoolExecutor(6) as pool:
        loaded = list(pool.map(lambda job: job.load(), jobs))
    assert sorted(opened) == sorted(pictures.glob("*.png"))
    for view, pixels in zip(views, loaded, strict=True):
        whole = place(open_picture(plan.items[view.item].source.file), view.placement)
        assert torch.equal(as_pixels(pixels), whole.flip(-1) if view.flipped else whole)


def test_losses_are_weighted_by_picture_set_and_role(tiny_base: Path, tmp_path: Path) -> None:
    own, other = (write_pictures(tmp_path / name, 3) for name in ("own", "other"))

    def run(weight: float, prior: float, regular: float) -> list[float]:
        sets = [
            {"images": str(own), "loss_weight": weight},
            {"images": str(other), "role": "regularisation", "loss_weight": regular},
        ]
        more = (f"data.sets={toml(sets)}", f"train.prior_loss_weight={prior}", "train.batch_size=6")
        return losses(session_for(tiny_base, None, tmp_path / "x.safetensors", *more), 1)

    (trained,), (regularised,), (both,), (scaled,) = run(1, 0, 1), run(0, 1, 1), run(1, 1, 1), run(2, 0.5, 3)
    assert trained > 0
    assert regularised > 0
    assert both == pytest.approx(trained + regularised, rel=1e-4)
    assert scaled == pytest.approx(2 * trained + 1.5 * regularised, rel=1e-4)


def test_regularisation_pictures_that_are_never_shown_are_told(tiny_base: Path, tmp_path: Path) -> None:
    own, other = write_pictures(tmp_path / "own", 2), write_pictures(tmp_path / "other", 5)
    sets = toml([{"images": str(own)}, {"images": str(other), "role": "regularisation"}])
    plan = plan_run(config_for(tiny_base, None, tmp_path / "x.safetensors", f"data.sets={sets}"))
    (finding,) = (finding for finding in plan.findings if finding.code == "regularisation-unused")
    assert "3 of 5 regularisation pictures" in str(finding)


def test_each_variant_is_encoded_once(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    def counting(*given: object) -> Conditioning:
        encoded.append(1)
        return encode(*given)  # ty: ignore[invalid-argument-type]

    from sdlora.training import contexts

    encode = contexts.encode_prompts
    monkeypatch.setattr(contexts, "encode_prompts", counting)
    more = [*everything(tmp_path), "train.text_encoder_learning_rate=0", "cache.disk=false"]
    session = session_for(tiny_base, None, tmp_path / "x.safetensors", *more)
    assert not encoded
    asked: set[str] = set()
    of = session.contexts.of

    def spy(captions: list[str]) -> Conditioning:
        asked.update(captions)
        return of(captions)

    monkeypatch.setattr(session.contexts, "of", spy)
    losses(session, STEPS)
    assert "" in asked
    assert len(asked) > 5
    assert len(encoded) == len(asked)


def test_shuffled_tags_never_need_more_chunks_than_there_are(tiny_base: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "set", 1)
    tags = [
        "one two three four five six seven eight nine ten eleven",
        "ab",
        "cd ef",
        *("gh ij kl mn op qr st" * 2,) * 8,
    ]
    (pictures / "0.txt").write_text(", ".join(tags))
    session = session_for(tiny_base, pictures, tmp_path / "x.safetensors", "data.shuffle_tags=true", "train.steps=60")
    captions = {sample.caption for step in range(60) for sample in session.plan.training.batch(step)}
    assert len(captions) > 20
    rows = session.contexts.of(sorted(captions))
    assert rows.context.shape[:2] == (len(captions), 77 * session.contexts.chunks)


def test_the_file_tells_the_settings_of_its_pictures(tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    more = [*everything(tmp_path), "data.keep_tokens=1", "train.steps=1"]
    package.train(config_for(tiny_base, None, output, *more), show_progress=False)
    metadata = read_header(output, ResumeError).metadata
    expected = {
        "ss_shuffle_caption": "True", "ss_keep_tokens": "1", "ss_flip_aug": "True", "ss_random_crop": "True",
        "ss_caption_tag_dropout_rate": "0.3", "ss_prior_loss_weight": "0.7", "ss_bucket_no_upscale": "False",
        "ss_min_bucket_reso": "32", "ss_max_bucket_reso": "160", "ss_num_train_images": "30", "ss_num_reg_images": "2",
        "ss_num_validation_images": "2",
    }  # fmt: skip
    assert {key: metadata.get(key) for key in expected} == expected
    assert json.loads(metadata["ss_dataset_dirs"]) == {"3_zorb": {"n_repeats": 6, "img_count": 5}}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"others": {"n_repeats": 1, "img_count": 2}}
    buckets = json.loads(metadata["ss_bucket_info"])
    assert sum(bucket["count"] for bucket in buckets["buckets"].values()) == 2 * (30 + 30)
    assert buckets["mean_img_ar_error"] > 0
    assert json.loads(metadata["ss_tag_frequency"])["3_zorb"]["zorb"] == 5
