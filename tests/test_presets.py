"""Presets: their values, what is stronger than they are, and that every value of a run can be explained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sdlora.cli import app
from sdlora.config.catalogue import all_settings
from sdlora.config.loading import load_config, load_stated
from sdlora.config.preset_reference import preset_markdown
from sdlora.config.presets import PRESET_TITLES, PRESETS
from sdlora.config.resolve import resolve_config
from sdlora.config.sections import SECTION_NAMES, Config, OutputSection
from sdlora.errors import ConfigError
from sdlora.families import FAMILIES
from sdlora.training.explain import ExplainedSetting, explain
from sdlora.training.plan import plan_config
from tests.conftest import ROOT, write_images

NEEDED = ("data.images=images", "data.trigger=zorb", "output.path=x.safetensors", "base.path=other")


def test_every_base_has_every_preset_with_settings_that_exist() -> None:
    assert set(PRESETS) == {"mini", *FAMILIES}
    known = {setting.name: setting for setting in all_settings()}
    for base, presets in PRESETS.items():
        assert list(presets) == list(PRESET_TITLES)
        for name, values in presets.items():
            assert len({value.setting for value in values}) == len(values)
            assert all(value.source and value.setting in known for value in values)
            # What a preset says is valid when a file says it.
            stated = [f"{value.setting}={json.dumps(value.value)}" for value in values]
            config = load_config(None, [*NEEDED, *stated])
            if base != "mini":
                family = FAMILIES[base]
                assert resolve_config(load_config(None, [*NEEDED, f"preset={name}"]), family).flat() == (
                    resolve_config(config, family).flat()
                )


def test_a_preset_is_stronger_than_defaults_and_weaker_than_all_else(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "character"\n[lora]\nrank = 5\n[data]\nimages = "i"\ntrigger = "zorb"\n')
    more = ["output.path=x.safetensors", "base.path=other", "optimizer.learning_rate=7e-4"]
    config = resolve_config(load_config(file, more), FAMILIES["sdxl"])
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (5, 2.5, "attention-mlp")
    assert config.optimizer.learning_rate == 7e-4
    assert config.optimizer.text_encoder_learning_rate == 6e-5
    assert config.optimizer.betas == (0.9, 0.99)
    assert resolve_config(config, FAMILIES["sdxl"]) == config
    assert resolve_config(load_config(file, [*more, "preset=style"]), FAMILIES["sdxl"]).lora.alpha == 2.5
    assert resolve_config(load_config(file, [*more, "preset=none"]), FAMILIES["sdxl"]).lora.targets == "attention"


def test_without_a_preset_the_defaults_stay() -> None:
    config = resolve_config(load_config(None, NEEDED), FAMILIES["sd1"])
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (16, 8.0, "attention")
    assert (config.optimizer.learning_rate, config.optimizer.text_encoder_learning_rate) == (3e-4, 5e-5)


def test_mini_has_values_of_its_own() -> None:
    settings = [each for each in NEEDED if not each.startswith("base")]
    config = resolve_config(load_config(None, [*settings, "preset=style"]), FAMILIES["sd1"])
    assert (config.optimizer.learning_rate, config.lora.alpha) == (1.5e-3, 16.0)


def test_epochs_are_stronger_than_the_steps_of_a_preset() -> None:
    settings = [each for each in NEEDED if not each.startswith("base")]
    config = resolve_config(load_config(None, [*settings, "preset=style", "train.epochs=3"]), FAMILIES["sd1"])
    plain = resolve_config(load_config(None, [*settings, "train.epochs=3"]), FAMILIES["sd1"])
    assert (config.train.epochs, config.train.steps) == (3, plain.train.steps)


def test_a_run_of_the_same_values_is_the_same_run() -> None:
    named = resolve_config(load_config(None, [*NEEDED, "preset=style"]), FAMILIES["sd1"])
    assert "preset" not in named.flat()


def test_what_is_said_about_a_preset_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="preset = 'stile': must be 'style', 'character', 'concept' or 'none'"):
        load_config(None, [*NEEDED, "preset=stile"])
    with pytest.raises(ConfigError, match=r"unknown key presets; did you mean preset\?"):
        load_config(None, [*NEEDED, "presets.a=1"])


def test_the_page_of_presets_is_fresh() -> None:
    """Run ``python -m sdlora.config.preset_reference > docs/presets.md`` where it is not."""
    assert (ROOT / "docs" / "presets.md").read_text(encoding="utf-8") == preset_markdown()


def explained(file: Path, *more: str) -> dict[str, ExplainedSetting]:
    loaded = load_stated(file, more)
    return {setting.name: setting for setting in explain(loaded, plan_config(loaded.config))}


@pytest.fixture
def run_file(tiny_base: Path, tmp_path: Path) -> Path:
    write_images(tmp_path / "images", 5)
    file = tmp_path / "run.toml"
    file.write_text(
        f'preset = "style"\n[base]\npath = "{tiny_base}"\n[data]\nimages = "images"\ntrigger = "zorb"\n'
        '[lora]\nrank = 3\n[train]\nepochs = 4\nbatch_size = 2\n[output]\npath = "x.safetensors"\n'
    )
    return file


def test_every_value_is_explained(run_file: Path) -> None:
    found = explained(run_file, "lora.alpha=3")
    assert len(found) == 1 + len(Config.model_validate(
        {"data": {"images": "i", "trigger": "z"}, "output": OutputSection(path="x.safetensors")}
    ).flat())  # fmt: skip
    assert all(setting.documentation and setting.source for setting in found.values())
    shown = {name: (each.value, each.origin, each.source) for name, each in found.items()}
    assert shown["preset"] == ("style", "stated", f"{run_file}:1")
    assert shown["lora.rank"] == (3, "stated", f"{run_file}:8")
    assert shown["lora.alpha"] == (3.0, "stated", "command line")
    value, origin, source = shown["lora.targets"]
    assert (value, origin) == ("attention-mlp", "preset")
    assert source.startswith("preset style for tiny: kohya")
    assert shown["data.resolution"] == (64, "base", "tiny, Stable Diffusion 1.x")
    assert shown["data.images"] == (str(run_file.parent / "images"), "stated", f"{run_file}:5")
    assert shown["train.steps"] == (12, "images", "5 images, 3 steps an epoch")
    assert shown["objective.noise_offset"] == (0.0, "default", "default")
    plain = explained(run_file, "preset=none")
    assert plain["lora.targets"].origin == "default"
    rate = plain["optimizer.text_encoder_learning_rate"]
    assert (rate.value, rate.origin, rate.source) == (5e-5, "base", "Stable Diffusion 1.x")


def test_what_kohyas_dataset_configuration_says_is_explained(run_file: Path) -> None:
    dataset = run_file.parent / "set.toml"
    dataset.write_text('[general]\nbatch_size = 1\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n')
    text = run_file.read_text().replace('images = "images"', 'dataset_config = "set.toml"')
    run_file.write_text(text.replace("batch_size = 2\n", "").replace("images", str(run_file.parent / "images")))
    dataset.write_text(dataset.read_text().replace("images", str(run_file.parent / "images")))
    found = explained(run_file)["train.batch_size"]
    assert (found.value, found.origin, found.source) == (1, "dataset", str(dataset))


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard output of a command that runs in this process."""
    assert not app([str(argument) for argument in arguments], standalone_mode=False)
    return capsys.readouterr().out


def test_the_command_explains_and_trains_nothing(run_file: Path, capsys) -> None:
    answer = printed(capsys, "train", run_file, "--explain", "--json")
    settings = {setting["name"]: setting for setting in json.loads(answer)["settings"]}
    assert {name.partition(".")[0] for name in settings} == {"preset", *SECTION_NAMES}
    assert (settings["lora.rank"]["value"], settings["lora.rank"]["source"]) == (3, f"{run_file}:8")
    assert not (run_file.parent / "x.safetensors").exists()


def test_a_first_run_on_mini_takes_the_style(tmp_path: Path, capsys) -> None:
    """As it is named in ``docs/presets.md``; with ``--preset none`` the defaults."""
    write_images(tmp_path / "images", 2)
    command = ("train", "--images", tmp_path / "images", "--trigger", "zorb", "--explain")
    text = printed(capsys, *command)
    assert re.search(r'preset = "style"\n    from: mini, and no configuration file', text)
    assert 'targets = "attention-mlp"\n    from: preset style for mini' in text
    assert 'path = "out/images.safetensors"\n    from: the name of the folder of images' in text
    assert 'targets = "attention"\n    from: default' in printed(capsys, *command, "--preset", "none")


def test_a_run_on_another_base_takes_no_preset(tiny_base: Path, tmp_path: Path, capsys) -> None:
    write_images(tmp_path / "images", 2)
    command = ("train", "--images", tmp_path / "images", "--trigger", "zorb", "--explain")
    for base in (("--base", tiny_base), (f"base.path={tiny_base}",)):
        text = printed(capsys, *command, *base)
        assert 'preset = "none"\n    from: default' in text
        assert 'targets = "attention"\n    from: default' in text


def test_an_optimizer_that_finds_its_rate_keeps_it() -> None:
    config = resolve_config(load_config(None, [*NEEDED, "preset=style", "optimizer.name=prodigy"]), FAMILIES["sd1"])
    assert (config.optimizer.learning_rate, config.optimizer.text_encoder_learning_rate) == (1.0, 1.0)
    assert config.lora.targets == "attention-mlp"
