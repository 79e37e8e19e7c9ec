"""Configuration files and overrides: values arrive, and every fault is reported with its place."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora.config.loading import load_config
from sdlora.config.sections import Config
from sdlora.config.setting import DECIDES_RESUMING
from sdlora.errors import ConfigError

GOOD = """
[data]
images = "images"
trigger = "zorb"

[output]
path = "out/x.safetensors"
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_defaults_and_overrides(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, GOOD), ["train.steps=7", "lora.alpha=4", "data.trigger=two words", "base.path='a=b'"]
    )
    assert (config.train.steps, config.lora.alpha, config.data.trigger, config.base.path) == (
        7,
        4.0,
        "two words",
        "a=b",
    )
    assert config.lora.rank == 16


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    text = GOOD + '[train]\nsteps = -3\nbatch_sise = 2\n[optimizer]\nlearning_rate = "fast"\n[lore]\nrank = 4\n'
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), ["nonsense"])
    problems = caught.value.problems
    assert len(problems) == 5
    text = "\n".join(problems)
    assert "run.toml:9: train.steps = -3" in text
    assert "run.toml:10: unknown key train.batch_sise; did you mean train.batch_size?" in text
    assert "run.toml:12: optimizer.learning_rate = 'fast'" in text
    assert "run.toml:13: unknown key lore; did you mean lora?" in text
    assert "'nonsense': expected section.key=value" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data", "not valid TOML"),
        ('[output]\npath = "x.safetensors"', "data is missing"),
        (GOOD.replace("x.safetensors", "x.ckpt"), "output.path = 'out/x.ckpt'"),
        (GOOD + "[lora]\nrank = true", "lora.rank = True"),
    ],
)
def test_faults_name_what_was_expected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config(write(tmp_path, text))


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "latin.toml").write_bytes("[data]\ntrigger = 'ü'".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "latin.toml")


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    try:
        assert isinstance(load_config(None, [text]), Config)
    except ConfigError as error:
        assert error.problems


def test_records_are_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    with pytest.raises(Exception, match="frozen"):
        config.train.steps = 3  # ty: ignore[invalid-assignment]


SETS = """
[data]
trigger = "zorb"
resolution = [512, 768]
caption_replace = [["grey", "gray"], ["a", "b"]]

[[data.sets]]
images = "a"
repeats = 10
caption_prefix = "p,"

[[data.sets]]
images = "b"
role = "regularisation"
loss_weight = 1

[output]
path = "out/x.safetensors"
"""


def test_several_sets_and_tuples_load(tmp_path: Path) -> None:
    data = load_config(write(tmp_path, SETS)).data
    assert [(one.images, one.role, one.repeats, one.loss_weight) for one in data.sets] == [
        (str(tmp_path / "a"), "train", 10, 1.0),
        (str(tmp_path / "b"), "regularisation", 1, 1.0),
    ]
    assert data.resolution == (512, 768)
    assert data.sides == (512, 768)
    assert data.caption_replace == (("grey", "gray"), ("a", "b"))
    assert load_config(write(tmp_path, SETS), ["data.resolution=640"]).data.sides == (640,)
    one_line = 'sets = [{images = "a", repeats = 2}, {images = "b"}]'
    inline = load_config(None, ["data." + one_line, "data.trigger=zorb", "output.path=x.safetensors"]).data
    assert [one.repeats for one in inline.sets] == [2, 1]


def test_faults_within_sets_have_their_lines(tmp_path: Path) -> None:
    text = SETS.replace('role = "reg', 'rol = "reg').replace("repeats = 10", "repeats = 0\nkeep_token = 2")
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "run.toml:9: data.sets.repeats = 0: must be at least 1" in text
    assert "run.toml:10: unknown key data.sets.keep_token; did you mean data.sets.keep_tokens?" in text
    assert "run.toml:15: unknown key data.sets.rol; did you mean data.sets.role?" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resolution = []", "run.toml:5: data.resolution = (): expected pixels from 64 to 4096"),
        ("resolution = [512, 32]", "data.resolution = (512, 32): expected pixels"),
        ("resolution = true", "data.resolution = True: expected pixels"),
        ("resolution = 512.0", "data.resolution = 512.0: expected pixels"),
        ("resolution = [512, 512]", "the same resolution twice"),
        ('caption_replace = [["a"]]', "expected pairs of old and new text"),
        ('caption_replace = ["ab"]', "expected pairs of old and new text"),
        ('caption_replace = [["", "a"]]', "expected pairs of old and new text"),
        ('caption_template = "{caption}"', "run.toml:5: data.caption_template = '{caption}' lacks {trigger}"),
        ('caption_template = "{trigger}"', "data.caption_template = '{trigger}' lacks {caption}"),
        (
            "min_bucket_reso = 512\nmax_bucket_reso = 256",
            "run.toml:5: data.min_bucket_reso = 512 is more than data.max",
        ),
        ("min_bucket_reso = 640\nresolution = [768, 512]", "min_bucket_reso = 640 is more than data.resolution = 512"),
        ("max_bucket_reso = 640\nresolution = [768, 512]", "max_bucket_reso = 640 is less than data.resolution = 768"),
        ('dataset_config = "x.toml"', "run.toml:5: data.dataset_config and data.images are both set; keep one"),
        ('sets = [{images = "a"}]', "run.toml:5: data.sets and data.images are both set; keep one of them"),
        ('[[data.sets]]\nimages = "a"\nrole = "validation"', "run.toml:5: data.sets has no set to train on"),
        ('[[data.sets]]\nimages = "a"\nmasks = "m"', "data.mask = 'none' leaves the masks in m unused"),
        (
            '[[data.sets]]\nimages = "a"\nloss_weight = inf',
            "data.sets.loss_weight = inf: must be a finite number",
        ),
        ('[[data.sets]]\nimages = "a"\ntrigger = "two  words"', "trigger = 'two  words' has white space"),
        (
            '[[data.sets]]\nimages = "a"\nresolution = 640\n[[data.sets]]\nimages = "b"',
            "data.resolution is missing: some",
        ),
        ('metadata = "m.csv"\n[[data.sets]]\nimages = "a"', "data.metadata belongs to data.images"),
    ],
)
def test_settings_of_data_that_do_not_fit(tmp_path: Path, line: str, message: str) -> None:
    text = GOOD.replace('trigger = "zorb"\n', f'trigger = "zorb"\n{line}\n')
    if "[[data.sets]]" in line and "no set" not in message:
        text = text.replace('images = "images"\n', "")
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_run_without_images_reports_the_three_ways_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.toml:2: data\.images is missing: .*data\.sets.*data\.dataset_config"):
        load_config(write(tmp_path, GOOD.replace('images = "images"\n', "")))


def test_flat_settings_distinguish_sets_and_may_leave_paths_out(tmp_path: Path) -> None:
    one, other = load_config(write(tmp_path, SETS)), load_config(write(tmp_path, SETS.replace("= 10", "= 11")))
    differing = [key for key, value in one.flat().items() if other.flat()[key] != value]
    assert differing == ["data.sets"]
    sets = json.loads(one.flat()["data.sets"])
    assert sets[0]["images"] == str(tmp_path / "a")
    assert sets[0]["repeats"] == 10
    private = load_config(None, [
        'data.sets=[{images = "/secret/a", metadata = "/secret/b", masks = "/secret/c"}]', "data.trigger=zorb",
        'data.mask="files"', "output.path=/secret/x.safetensors", "base.path=/secret/base", "base.vae=/secret/vae",
        "cache.folder=/secret/cache",
    ])  # fmt: skip
    assert "secret" in "".join(private.flat().values())
    assert "secret" not in "".join(private.flat(DECIDES_RESUMING).values())
    assert json.loads(private.flat(DECIDES_RESUMING)["data.sets"])[0]["repeats"] == 1


@given(st.text("[]data.set{}\"'= \n01a_", max_size=120))
def test_any_file_is_a_configuration_or_a_config_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            assert isinstance(load_config(write(Path(folder), GOOD + text)), Config)
        except ConfigError as error:
            assert error.problems


def test_relative_paths_in_a_file_go_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "run.toml"
    file.write_text(
        '[data]\ntrigger = "zorb"\nmask = "files"\n[[data.sets]]\nimages = "../images"\nmetadata = "~/m.csv"\n'
        'masks = "masks"\n[base]\nvae = "vae.safetensors"\n[cache]\nfolder = "/cache"\n'
        '[output]\npath = "../out/x.safetensors"\n'
    )
    config = load_config("configs/run.toml", ["base.text_encoder=te", "base.text_encoder_2=~/te"])
    one = config.data.sets[0]
    assert (one.images, one.metadata, one.masks) == ("images", str(tmp_path / "home/m.csv"), str(Path("configs/masks")))
    assert (config.base.path, config.base.vae) == ("mini", str(Path("configs/vae.safetensors")))
    assert (config.base.text_encoder, config.base.text_encoder_2) == ("te", str(tmp_path / "home/te"))
    assert (config.cache.folder, config.output.path) == ("/cache", str(Path("out/x.safetensors")))
    monkeypatch.chdir(tmp_path / "configs")
    beside = load_config("run.toml", ["base.text_encoder=te", "base.text_encoder_2=~/te"])
    assert beside.output.path == "../out/x.safetensors"
    assert beside.flat(DECIDES_RESUMING) == config.flat(DECIDES_RESUMING)
    assert load_config(file, ["output.path=y.safetensors"]).output.path == "y.safetensors"


def test_a_path_through_a_link_leads_where_the_system_leads(tmp_path: Path) -> None:
    (tmp_path / "real" / "configs").mkdir(parents=True)
    try:
        (tmp_path / "link").symlink_to(tmp_path / "real" / "configs")
    except OSError:
        pytest.skip("no links here")
    (tmp_path / "link" / "run.toml").write_text(GOOD.replace('"images"', '"../images"'))
    images = Path(str(load_config(tmp_path / "link" / "run.toml").data.images))
    assert images.resolve() == tmp_path.resolve() / "real" / "images"


def test_a_whole_number_with_a_point_is_answered_with_itself() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps = 300\.0: must be a whole number, for example 300$"):
        load_config(None, ["train.steps=300.0", "data.images=a", "data.trigger=b", "output.path=c.safetensors"])
