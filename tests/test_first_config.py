"""``sdlora init``: what is chosen for a folder of images, and a file that states it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from sdlora.cli import app
from sdlora.config.catalogue import all_settings
from sdlora.config.loading import load_config, load_stated
from sdlora.config.presets import preset_values
from sdlora.lint.run import lint_dataset
from sdlora.training.explain import explain
from sdlora.training.plan import plan_config
from tests.conftest import ROOT, write_images


def write_captions(images: Path, text: str, extension: str = ".txt") -> None:
    for number, file in enumerate(sorted(images.glob("*.png"))):
        file.with_suffix(".txt").unlink(missing_ok=True)
        file.with_suffix(extension).write_text(text.format(["a dog", "a red house", "two birds", "a tree"][number % 4]))


def init(images: Path, out: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["init", str(images), "--out", str(out), *more])


def written(images: Path, out: Path, *more: str) -> dict[str, Any]:
    result = init(images, out, *more)
    assert result.exit_code == 0, result.output
    return tomllib.loads(out.read_text(encoding="utf-8"))


def effective(file: Path | None, *settings: str) -> dict[str, Any]:
    loaded = load_stated(file, settings)
    return {setting.name: setting.value for setting in explain(loaded, plan_config(loaded.config))}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = write_images(tmp_path / "images", 4, sizes=((64, 64), (80, 48)))
    write_captions(folder, "zorblax drawing of {}")
    return folder


def test_train_takes_the_file_as_it_is(images: Path, tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings" / "zorb.toml"
    tables = written(images, file, "--base", str(tiny_base))
    assert tables["preset"] == "style"
    assert tables["data"] == {"images": "../images", "trigger": "zorblax"}
    assert tables["output"] == {"path": "out/zorb.safetensors"}
    assert {name for name, table in tables.items() if table} == {"preset", "base", "data", "output"}
    assert str(tmp_path) not in file.read_text()
    more = ["train.steps=1", "samples.steps=1", "samples.size=64"]
    result = CliRunner().invoke(app, ["train", str(file), *more])
    assert result.exit_code == 0, result.output
    assert (file.parent / "out" / "zorb.safetensors").is_file()


@pytest.mark.parametrize("preset", ["style", "concept"])
def test_every_value_in_a_comment_is_the_one_in_force(
    preset: str, images: Path, tiny_base: Path, tmp_path: Path
) -> None:
    file, changed = tmp_path / "zorb.toml", tmp_path / "changed.toml"
    written(images, file, "--base", str(tiny_base), "--preset", preset)
    text = file.read_text()
    keys = {setting.key for setting in all_settings()}
    stated = re.sub(
        r"^# (\w+)( = )", lambda match: f"{match[1]} = " if match[1] in keys else match[0], text, flags=re.M
    )
    changed.write_text(stated.replace("out/zorb", "out/changed"))
    tables = tomllib.loads(stated)
    for value in preset_values(preset, "sd1"):  # ty: ignore[invalid-argument-type]
        section, _, key = value.setting.partition(".")
        assert tables[section][key] == value.value
    before, after = effective(file), effective(changed)
    differing = {name for name in before if before[name] != after[name]}
    assert differing == {"samples.prompts", "output.path"}
    assert after["samples.prompts"][0] == "zorblax drawing of a dog"


def test_a_folder_of_this_repository_gets_its_own_trigger_and_the_length_of_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    result = init(ROOT / "datasets" / "pixel", file, "--json")
    answer = json.loads(result.stdout)
    assert (answer["trigger"], answer["config"], answer["findings"]) == ("pixgrid", str(file), [])
    steps = {value.setting: value.value for value in preset_values("style", "mini")}["train.steps"]
    assert answer["steps"] == steps
    assert f"# steps = {steps}" in file.read_text()


def test_a_trigger_is_made_up_where_the_captions_have_no_rare_word(
    images: Path, tiny_base: Path, tmp_path: Path
) -> None:
    write_captions(images, "a drawing of {}")
    trigger = written(images, tmp_path / "x.toml", "--base", str(tiny_base))["data"]["trigger"]
    assert trigger.isalpha()
    assert not any(trigger in file.read_text() for file in images.glob("*.txt"))
    codes = {finding.code for finding in lint_dataset(images, trigger=trigger, base=str(tiny_base)).findings}
    assert not codes & {"trigger-common", "trigger-many-tokens"}
    assert written(images, tmp_path / "y.toml", "--trigger", "wozz")["data"]["trigger"] == "wozz"


def test_what_the_images_ask_for_is_stated(images: Path, tmp_path: Path) -> None:
    write_captions(images, "zorblax, {}", ".caption")
    (images / "mask").mkdir()
    for file in images.glob("*.png"):
        with Image.open(file) as image:
            Image.new("L", image.size, 200).save(images / "mask" / file.name)
    tables = written(images, tmp_path / "x.toml")
    assert tables["data"]["caption_extension"] == ".caption"
    assert tables["data"]["mask"] == "files"
    assert tables["data"]["resolution"] == 64  # Of mini's 128: the images have 64 x 64 and 80 x 48.
    plan = plan_config(load_config(tmp_path / "x.toml"))
    assert plan.resolution == 64
    assert all(item.mask and any(item.source.captions) for item in plan.items)


def test_large_images_keep_the_resolution_of_the_base(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 3, sizes=((300, 200),))
    assert "resolution" not in written(images, tmp_path / "x.toml")["data"]


def test_problems_are_in_the_file_and_on_the_screen(images: Path, tiny_base: Path, tmp_path: Path) -> None:
    (images / "1.txt").unlink()
    (images / "2.png").write_bytes(b"no image")
    named = images / "a\nb\x1b.png"
    named.write_bytes((images / "3.png").read_bytes())
    named.with_suffix(".txt").write_text("zorblax [a thing")
    file = tmp_path / "x.toml"
    result = init(images, file, "--base", str(tiny_base))
    assert result.exit_code == 0, result.output
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    assert tables["data"]["trigger"] == "zorblax"
    for part in ("1.png", "2.png", "are not in pairs"):
        assert part in file.read_text().split("preset = ")[0]
        assert part in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere"], 1, "nowhere: no such folder"),
        (["empty"], 1, "no image among its 0 files"),
        (["images", "--preset", "stile"], 1, "preset = 'stile'"),
        (["images", "--base", "nowhere.safetensors"], 1, "nowhere.safetensors"),
        (["images", "--out", "x.yaml"], 1, "x.yaml: the name of the configuration must end in .toml"),
        (["images", "--out", "there.toml"], 1, "there.toml: exists already; choose another name with --out"),
        ([], 2, "DIR"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    arguments: list[str], code: int, said: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.toml").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["init", *arguments])
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert code == 2 or len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.toml").read_text() == "mine"


def test_the_name_is_that_of_the_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images)
    result = CliRunner().invoke(app, ["init", "."])
    assert result.exit_code == 0, result.output
    assert tomllib.loads((images / "images.toml").read_text())["data"]["images"] == "."
