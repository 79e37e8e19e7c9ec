"""kohya's dataset configuration, read as it is or refused key by key."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora.config.kohya_dataset_keys import KEYS
from sdlora.config.resolve import resolve_config, resolve_data
from sdlora.config.sections import Config, DataSection, OutputSection, TrainSection
from sdlora.data.sources import find_sources
from sdlora.errors import ConfigError
from sdlora.training.plan import plan_config
from tests.conftest import write_images
from tests.sets import codes, images_in, put


def resolved(tmp_path: Path, toml: str, **data: Any) -> Config:
    file = put(tmp_path / "dataset.toml", toml)
    train = TrainSection(**data.pop("train", {}))
    section = DataSection(**{"dataset_config": str(file), "trigger": "zorb", **data})
    return resolve_config(Config(data=section, train=train, output=OutputSection(path="x.safetensors")))


def refused(tmp_path: Path, toml: str, **data: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, toml, **data)
    return [problem.replace(str(tmp_path / "dataset.toml"), "T") for problem in caught.value.problems]


EXAMPLE = """
[general]
caption_extension = ".txt"
shuffle_caption = true
flip_aug = true
color_aug = false
cache_info = true
keep_tokens = 1

[[datasets]]
batch_size = 4
resolution = 512
keep_tokens = 2
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024

[[datasets.subsets]]
image_dir = "ink"
class_tokens = "ink drawing"

[[datasets.subsets]]
image_dir = "chalk"
class_tokens = "chalk drawing"
keep_tokens = 3
num_repeats = 10

[[datasets.subsets]]
image_dir = "prior"
class_tokens = "drawing"
is_reg = true
keep_tokens = 1

[[datasets]]
batch_size = 4
resolution = [512, 512]
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024

[[datasets.subsets]]
image_dir = "plates"
metadata_file = "plates/captions.json"
"""
"""Folders of each kind that kohya's trainer knows, with settings on each of its levels."""


def test_a_dataset_configuration_of_every_kind_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(tmp_path, EXAMPLE)
    data = config.data
    assert [(one.images, one.role, one.class_prompt, one.repeats, one.keep_tokens) for one in data.sets] == [
        ("ink", "train", "ink drawing", 1, 2),
        ("chalk", "train", "chalk drawing", 10, 3),
        ("prior", "regularisation", "drawing", 1, 1),
        ("plates", "train", None, 1, 1),
    ]
    assert (data.resolution, data.min_bucket_reso, data.max_bucket_reso) == (512, 256, 1024)
    assert {one.flip for one in data.sets} == {True}
    assert config.train.batch_size == 4
    assert data.dataset_config is None
    assert resolve_config(config) == config

    monkeypatch.chdir(tmp_path)
    images_in(
        tmp_path, "ink/a.png", "ink/deep/never.png", "chalk/5_x/never.png", "chalk/b.png", "prior/c.png", "plates/d.png"
    )
    put(tmp_path / "ink" / "a.txt", "first line\nsecond line")
    put(tmp_path / "plates" / "captions.json", '{"d": {"caption": "a bird", "tags": "1bird, sky"}}')
    listing = find_sources(data)
    assert [(s.file.name, s.captions, s.repeats, s.rules.plain(s.captions)) for s in listing.sources] == [
        ("a.png", ("first line",), 1, "zorb, first line"),
        ("b.png", ("chalk drawing",), 10, "zorb, chalk drawing"),
        ("c.png", ("drawing",), 1, "drawing"),
        ("d.png", ("a bird, 1bird, sky",), 1, "zorb, a bird, 1bird, sky"),
    ]
    assert codes(listing) == [("caption-lines", "warning", "a.txt")]
    wild = resolved(tmp_path, EXAMPLE.replace("cache_info = true", "enable_wildcard = true"))
    assert find_sources(wild.data).sources[0].captions == ("first line", "second line")
    assert find_sources(wild.data).sources[0].rules.wildcards


LEVELS = ("general", "dataset", "subset")


@given(st.fixed_dictionaries({level: st.none() | st.integers(0, 9) for level in LEVELS}), st.integers(0, 9))
def test_subset_goes_before_dataset_before_general_before_data(values: dict[str, int | None], own: int) -> None:
    lines = {level: f"keep_tokens = {value}" if value is not None else "" for level, value in values.items()}
    toml = (
        f'[general]\n{lines["general"]}\n[[datasets]]\n{lines["dataset"]}\n[[datasets.subsets]]\nimage_dir = "a"\n'
        + lines["subset"]
    )
    expected = next((values[level] for level in reversed(LEVELS) if values[level] is not None), own)
    with tempfile.TemporaryDirectory() as folder:
        config = resolved(Path(folder), toml, keep_tokens=own)
        put(Path(folder) / "a.png"), put(Path(folder) / "a.txt", "x")
        data = config.data.model_copy(update={"sets": (config.data.sets[0].model_copy(update={"images": folder}),)})
        assert find_sources(data).sources[0].rules.keep_tokens == expected


REFUSED = {
    "color_aug": "true", "face_crop_aug_range": "[1.0, 3.0]", "caption_separator": '"."', "secondary_separator": '";;;"',
    "keep_tokens_separator": '"|||"', "token_warmup_min": "2", "token_warmup_step": "0.5",
    "caption_dropout_every_n_epochs": "3", "custom_attributes": "{a = 1}", "resize_interpolation": '"area"',
    "network_multiplier": "0.5", "validation_split": "0.1", "validation_seed": "7", "skip_image_resolution": "768",
}  # fmt: skip
HARMLESS = {
    "color_aug": "false", "caption_separator": '","', "secondary_separator": '""', "keep_tokens_separator": '""',
    "token_warmup_min": "1", "token_warmup_step": "0", "caption_dropout_every_n_epochs": "0", "custom_attributes": "{}",
    "resize_interpolation": '"lanczos"', "network_multiplier": "1.0", "validation_split": "0.0", "validation_seed": "0",
    "cache_info": "true",
}  # fmt: skip


def test_what_is_not_supported_is_named_key_by_key(tmp_path: Path) -> None:
    body = '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n'
    general = "[general]\n" + "".join(f"{key} = {value}\n" for key, value in REFUSED.items())
    problems = refused(tmp_path, general + body)
    assert len(problems) == len(REFUSED)
    for number, key in enumerate(REFUSED, 2):
        assert [line for line in problems if line.startswith(f"T:{number}: {key} = ") and "is not supported" in line]
    harmless = "[general]\n" + "".join(f"{key} = {value}\n" for key, value in HARMLESS.items())
    assert resolved(tmp_path, harmless + body).data.sets == resolved(tmp_path, body).data.sets
    assert {key for key, known in KEYS.items() if known.harmless is not None} == {*REFUSED, *HARMLESS}


def test_faults_of_a_dataset_configuration_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    toml = (
        "[general]\nbatchsize = 3\nimage_dir = 'x'\n[[datasets]]\nresolution = [768, 512]\nkeep_tokens = true\n"
        "[[datasets.subsets]]\nimage_dir = 'a'\nnum_repeats = 0\n[[datasets.subsets]]\nbatch_size = 2\n[other]\n"
    )
    assert sorted(refused(tmp_path, toml)) == [
        "T:10: image_dir is missing",
        "T:11: batch_size cannot be in [[datasets.subsets]], only in [general] or [[datasets]]",
        "T:12: unknown key other; expected [general] or [[datasets]]",
        "T:2: unknown key batchsize; did you mean batch_size?",
        "T:3: image_dir cannot be in [general], only in [[datasets.subsets]]",
        "T:5: resolution = [768, 512] is not square; give the side of a square, whose area the buckets get",
        "T:6: keep_tokens = True: expected a whole number",
        "T:9: num_repeats = 0: must be at least 1",
    ]


SUBSETS = "[[datasets]]\n{0}\n[[datasets.subsets]]\nimage_dir = 'a'\n{1}\n[[datasets.subsets]]\nimage_dir = 'b'\n{2}\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("resolution = [768, 512]", "", ""), "T:2: resolution = [768, 512] is not square"),
        (
            ("", "caption_dropout_rate = 0.1", "caption_dropout_rate = 0.2"),
            "T:8: caption_dropout_rate is 0.1 and 0.2 in different subsets, but must be the same for the whole run",
        ),
        (("", "alpha_mask = true", ""), "alpha_mask is alpha and none"),
        (("", "alpha_mask = true", "conditioning_data_dir = 'c'"), "alpha_mask is alpha and files"),
        (
            ("resolution = 256\nmin_bucket_reso = 512", "", ""),
            "min_bucket_reso = 512 is more than data.resolution = 256",
        ),
        (("resolution = 9999", "", ""), "T:2: resolution = 9999: expected pixels from 64 to 4096"),
        (("resolution = [[1], [1]]", "", ""), "T:2: resolution = [1]: expected pixels from 64 to 4096"),
        (("resolution = ['a', 'b', 'c']", "", ""), "T:2: resolution = ['a', 'b', 'c'] is not square"),
        (("", "", "image_dir = 'a'"), "not valid TOML"),
    ],
)
def test_settings_of_the_run_must_agree_in_all_subsets(tmp_path: Path, values: tuple[str, ...], message: str) -> None:
    assert any(message in line for line in refused(tmp_path, SUBSETS.format(*values)))


def test_settings_for_the_whole_run_reach_their_sections(tmp_path: Path) -> None:
    common = (
        "batch_size = 3\nenable_bucket = false\nbucket_reso_steps = 32\nbucket_no_upscale = true\nrandom_crop = true\n"
        "caption_dropout_rate = 0.25\nflip_aug = true"
    )
    config = resolved(
        tmp_path, SUBSETS.format(common, "conditioning_data_dir = 'm'\ncaption_tag_dropout_rate = 0.5", "")
    )
    data = config.data
    assert (config.train.batch_size, config.data.caption_dropout) == (3, 0.25)
    assert (data.enable_bucket, data.bucket_reso_steps, data.bucket_no_upscale) == (False, 32, True)
    assert data.mask == "files"
    assert [(one.masks, one.tag_dropout, one.subfolders, one.crop, one.flip) for one in data.sets] == [
        ("m", 0.5, False, "random", True),
        (None, 0.0, False, "random", True),
    ]
    alpha = resolved(tmp_path, SUBSETS.format("", "alpha_mask = true", "alpha_mask = true"))
    assert alpha.data.mask == "alpha"
    assert alpha.train == TrainSection()
    assert resolve_data(DataSection(dataset_config=str(tmp_path / "dataset.toml"), trigger="zorb")) == alpha.data


def test_a_run_is_planned_by_what_the_dataset_configuration_says(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set", 5)
    toml = (
        f"[[datasets]]\nbatch_size = 2\nresolution = 64\ncaption_extension = '.txt'\ncaption_dropout_rate = 0.25\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder}'\nnum_repeats = 3\n"
    )
    file = put(tmp_path / "dataset.toml", toml)
    data = DataSection(dataset_config=str(file), trigger="zorb")
    plan = plan_config(Config(data=data, output=OutputSection(path=str(tmp_path / "x.safetensors"))))
    assert plan.config.data.caption_dropout == 0.25
    assert plan.identity.config["train.batch_size"] == "2"
    assert {len(batch) for batch in plan.batches.epoch(0)} <= {1, 2}
    assert sum(len(batch) for batch in plan.batches.epoch(0)) == 15


def test_datasets_may_have_resolutions_flips_and_crops_of_their_own(tmp_path: Path) -> None:
    folder = images_in(tmp_path / "set", "a.png")
    put(folder / "a.txt", "a")
    one = "[[datasets]]\n{0}\n[[datasets.subsets]]\nimage_dir = '{1}'\n{2}\n"
    toml = one.format("resolution = 512", folder, "flip_aug = true") + one.format("resolution = [768, 768]", folder, "")
    config = resolved(tmp_path, toml + one.format("", folder, "random_crop = true"), resolution=640, crop="salient")
    assert config.data.sides == (512, 768, 640)
    assert refused(tmp_path, toml, resolution=640) == ["T: every dataset has its resolution, so remove data.resolution"]
    listing = find_sources(config.data)
    assert [(source.resolution, source.flip, source.crop) for source in listing.sources] == [
        ((512,), True, "salient"),
        ((768,), False, "salient"),
        ((640,), False, "random"),
    ]
    assert listing.findings == (), "the same image at different resolutions is meant"
    problems = refused(tmp_path, toml + one.format("", folder, ""))
    assert problems == ["T: data.resolution is missing: some sets have one of their own, and the others need this"]
    assert codes(find_sources(resolved(tmp_path, toml + one.format("resolution = 512", folder, "")).data)) == [
        ("image-shared", "warning", "a.png")
    ]
    twice = one.format("", "a", "") + "[[datasets.subsets]]\nimage_dir = 'a'\n"
    assert refused(tmp_path, twice) == ["T:6: a is in this dataset already; remove one of them"]


def test_a_dataset_configuration_and_the_run_must_not_contradict(tmp_path: Path) -> None:
    toml = SUBSETS.format("resolution = 512\nbatch_size = 4", "", "")
    problems = refused(tmp_path, toml, resolution=768, train={"batch_size": 2})
    assert problems == [
        "T: asks for data.resolution = 512, but the configuration of the run for 768; keep one of them",
        "T: asks for train.batch_size = 4, but the configuration of the run for 2; keep one of them",
    ]
    agreed = resolved(tmp_path, toml, resolution=512, train={"batch_size": 4, "steps": 9})
    assert (agreed.train.batch_size, agreed.train.steps) == (4, 9)


def test_files_that_are_no_dataset_configuration(tmp_path: Path) -> None:
    assert refused(tmp_path, "") == ["T: no [[datasets.subsets]]; write one for each folder of images"]
    assert "expected tables [general] and [[datasets]]" in refused(tmp_path, "datasets = 3")[0]
    assert "not valid TOML" in refused(tmp_path, "[x")[0]
    with pytest.raises(ConfigError, match="no such configuration file"):
        find_sources(DataSection(dataset_config=str(tmp_path / "none.toml"), trigger="zorb"))
    file = put(tmp_path / "d.json", json.dumps({"datasets": [{"subsets": [{"image_dir": "a"}]}]}))
    assert resolve_data(DataSection(dataset_config=str(file), trigger="zorb")).sets[0].images == "a"
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        resolve_data(DataSection(dataset_config=str(put(tmp_path / "e.json", "{")), trigger="zorb"))


@given(st.text("[]datsubege.=_{}\"'1\n ", max_size=100))
def test_any_text_is_a_dataset_configuration_or_a_config_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            assert resolved(Path(folder), text + EXAMPLE).data.sets
        except ConfigError as error:
            assert error.problems
