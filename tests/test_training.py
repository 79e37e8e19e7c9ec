"""Training on a tiny base: several processes, what is refused, validation, and what the file says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sdlora as package
from sdlora.config.loading import load_config
from sdlora.errors import BaseModelError, ConfigError, DataError, ResumeError, TrainingError
from sdlora.formats.safetensors_file import read_header
from sdlora.progress import Silence
from sdlora.training.plan import plan_config
from sdlora.training.validation import validation_loss
from tests.conftest import write_images
from tests.training_runs import STEPS, config_for, everything, session_for, toml


def test_file_holds_every_module_and_the_change_is_not_zero(finished: tuple[Path, Path], tiny_base: Path) -> None:
    report = package.inspect(finished[1])
    assert report.modules == {"unet": 32, "text_encoder": 8, "text_encoder_2": 0}
    assert (report.family, report.format, report.trigger, report.problems) == ("sd1", "kohya", ("zorb",), ())
    assert report.rank
    assert report.rank.min == report.rank.max == 4
    assert report.norm
    assert min(report.norm.values()) > 0.01
    metadata = report.metadata
    buckets = json.loads(metadata["ss_bucket_info"])["buckets"]
    assert [buckets[i] for i in "01"] == [{"resolution": [64, 64], "count": 3}, {"resolution": [80, 48], "count": 2}]
    assert metadata["ss_steps"] == str(STEPS)
    assert str(tiny_base.parent) not in json.dumps(metadata)


def test_torchrun_has_its_own_exit_code_and_the_error_is_printed(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "sdlora"]
    command = [sys.executable, *launch, "train", "--images", "nowhere", "--trigger", "zorb"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 1
    assert "error: nowhere: no such folder" in result.stderr


def test_frozen_text_encoder_is_left_out(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    more = ("optimizer.text_encoder_learning_rate=0", "data.caption_dropout=0.5")
    package.train(config_for(tiny_base, finished[0], output, *more))
    report = package.inspect(output)
    assert report.modules == {"unet": 32, "text_encoder": 0, "text_encoder_2": 0}
    assert report.metadata["ss_text_encoder_lr"] == "None"


def test_a_run_that_diverges_stops_and_writes_nothing(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    more = (
        "optimizer.learning_rate=0.99",
        "optimizer.max_grad_norm=1e30",
        "lora.alpha=1e30",
        "optimizer.warmup_steps=0",
    )
    with pytest.raises(TrainingError, match=r"lower optimizer\.learning_rate"):
        package.train(config_for(tiny_base, finished[0], output, *more))
    assert not output.exists()


def test_faults_are_found_before_a_model_is_loaded(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sdlora.training.loop.load_base", refuse)
    output = tmp_path / "x.safetensors"
    with pytest.raises(DataError):
        package.train(config_for(tiny_base, tmp_path / "none", output))
    with pytest.raises(BaseModelError, match="no such base"):
        package.train(config_for(tmp_path / "none", finished[0], output))
    rates = ("optimizer.learning_rate=0", "optimizer.text_encoder_learning_rate=0")
    with pytest.raises(ConfigError, match="nothing would be trained"):
        package.train(config_for(tiny_base, finished[0], output, *rates))


def test_images_of_other_shapes_get_buckets_of_their_own(tmp_path: Path) -> None:
    images = write_images(tmp_path / "set", 6, sizes=((300, 300), (400, 250), (100, 190)))
    config = load_config(None, [f"data.images={images}", "data.trigger=zorb", "output.path=x.safetensors"])
    plan = plan_config(config)
    assert {(p.width, p.height) for p in plan.placements} == {(128, 128), (160, 96), (96, 160)}
    assert len(plan.batches.buckets) == 3


def test_validation_images_change_nothing_and_are_measured_the_same_each_time(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    held = write_images(tmp_path / "held", 3, sizes=((64, 64), (60, 100)))
    sets = toml([{"images": str(finished[0])}, {"images": str(held), "role": "validation"}])
    output = tmp_path / "x.safetensors"
    result = package.train(config_for(tiny_base, None, output, f"data.sets={sets}")).result
    one, other = load_file(finished[1]), load_file(output)
    assert all(torch.equal(one[name], other[name]) for name in one)
    metadata = read_header(output, ResumeError).metadata
    assert (metadata["ss_num_train_images"], metadata["ss_num_validation_images"]) == ("5", "3")
    assert json.loads(metadata["ss_dataset_dirs"]) == {"images": {"n_repeats": 1, "img_count": 5}}

    session = session_for(tiny_base, None, tmp_path / "y.safetensors", f"data.sets={sets}")
    with session.attached():
        untrained = [validation_loss(session, Silence()) for _ in range(2)]
    assert untrained[0] == untrained[1]
    assert result.validation_loss
    assert untrained[0] != result.validation_loss
    assert "sdlora_validation_loss" not in read_header(finished[1], ResumeError).metadata


def test_a_dataset_configuration_of_kohyas_trainer_is_trained(tiny_base: Path, tmp_path: Path) -> None:
    for name, count in (("mine", 3), ("cats", 4)):
        write_images(tmp_path / name, count, sizes=((64, 64), (100, 60)))
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
    plan = plan_config(config)
    assert [(own.min_size, own.max_size, own.step) for own in plan.rules] == [(48, 96, 16)]
    assert plan.batches.batch_size == 2
    assert sum(plan.batches.repeats) == 30
    package.train(config)
    metadata = read_header(output, ResumeError).metadata
    assert metadata["ss_num_train_images"] == "15"
    assert (metadata["ss_flip_aug"], metadata["ss_shuffle_caption"]) == ("True", "True")
    assert metadata["ss_total_batch_size"] == "2"


def test_the_file_states_the_settings_of_its_images(tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    more = [*everything(tmp_path), "data.keep_tokens=1", "train.steps=1"]
    package.train(config_for(tiny_base, None, output, *more))
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
