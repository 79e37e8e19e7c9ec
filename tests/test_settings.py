"""Settings state what they are: documentation, what they affect, kohya's name; and answers to keys by other names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdlora.config.catalogue import all_sections, all_settings
from sdlora.config.kohya_dataset_keys import KEYS, SET_KEYS
from sdlora.config.kohya_names import ABBREVIATIONS, ELSEWHERE, NOT_SUPPORTED, UNNECESSARY
from sdlora.config.loading import load_config, load_dataset
from sdlora.config.reference import reference_markdown, reference_text, select_sections
from sdlora.config.resolve import resolve_config, resolve_data
from sdlora.config.sections import SECTION_NAMES, Config, DataSection, OutputSection, SamplesSection, SetSection
from sdlora.config.setting import DECIDES_RESUMING
from sdlora.errors import ConfigError
from sdlora.training.checkpoint import RunIdentity
from tests.conftest import ROOT

NEEDED = ("data.images=images", "data.trigger=zorb", "output.path=x.safetensors")


def problems_of(file: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return list(caught.value.problems)


def test_every_section_and_setting_is_documented() -> None:
    for section in all_sections():
        assert section.documentation.endswith("."), section.name
        for setting in section.settings:
            assert setting.documentation.endswith("."), setting.name
            assert setting.values, setting.name


def test_the_page_of_settings_is_fresh() -> None:
    """Run ``python -m sdlora.config.reference > docs/settings.md`` where it is not."""
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == reference_markdown()


def test_the_settings_that_decide_resuming() -> None:
    config = Config(data=DataSection(images="images", trigger="zorb"), output=OutputSection(path="x.safetensors"))
    never = {
        *("base.path", "base.vae", "base.text_encoder", "base.text_encoder_2", "base.attention"),
        *("data.images", "data.metadata", "data.dataset_config", "train.save_every"),
        *("train.gradient_checkpointing", "train.micro_batch", "train.fit", "train.deterministic", "train.compile"),
        *("cache.disk", "cache.folder", "cache.max_gigabytes", "output.path", "lora.start_from"),
        "validation.every",
        "train.keep_state",
        *(f"samples.{key}" for key in SamplesSection.model_fields),
    }
    settings = config.flat()
    expected = {
        key for key in settings if key not in never and (not key.startswith("output.") or key == "output.precision")
    }
    assert len(settings) == 129
    assert set(config.flat(DECIDES_RESUMING)) == expected
    sets = {setting.key for setting in all_settings() if setting.section == "data.sets" and setting.affects == "place"}
    assert sets == {"images", "metadata", "masks"}


def test_a_set_takes_from_data_what_it_does_not_state() -> None:
    stated = SetSection(images="a", flip=False, keep_tokens=3)
    data = DataSection(sets=(stated, SetSection(images="b")), flip=True, keep_tokens=1, crop="random", resolution=512)
    resolved = resolve_data(data)
    assert [(section.flip, section.keep_tokens, section.crop, section.own_sides) for section in resolved.sets] == [
        (False, 3, "random", (512,)),
        (True, 1, "random", (512,)),
    ]
    assert resolve_data(resolved) == resolved
    named = data.model_copy(update={"trigger": "zorb"})
    config = resolve_config(Config(data=named, output=OutputSection(path="x.safetensors")))
    written = json.loads(config.flat()["data.sets"])
    common = {"loss_weight": 1.0, "repeats": 1, "role": "train", "subfolders": True}
    assert written == [{**common, "images": "a", "flip": False, "keep_tokens": 3}, {**common, "images": "b"}]


def test_only_a_run_needs_a_trigger_word_and_an_output(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[data]\nimages = "images"\n[base]\npath = "other"\n')
    data, base = load_dataset(file, ["data.resolution=64"])
    expected = (str(tmp_path / "images"), None, 64, str(tmp_path / "other"))
    assert (data.images, data.trigger, data.resolution, base.path) == expected
    trigger = f"{file}:1: data.trigger is missing; name the trigger word: --trigger WORD"
    assert problems_of(file) == [
        f"{file}: output is missing; name the file to write: --out FILE.safetensors",
        trigger,
    ]
    assert problems_of(file, "output.path=x.safetensors") == [trigger]
    with pytest.raises(ConfigError, match=r"run\.toml: unknown key train\.stps; did you mean train\.steps\?"):
        load_dataset(file, ["train.stps=3"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.network_dim=8", "unknown key train.network_dim: kohya's network_dim is lora.rank here"),
        ("network_dim=8", "'network_dim=8': kohya's network_dim is lora.rank here"),
        ("train.color_aug=true", "unknown key train.color_aug: color_aug of kohya's trainer is not supported yet"),
        ("train.learning_rate=1e-4", "unknown key train.learning_rate: it is optimizer.learning_rate here"),
        ("train.lr=1e-4", "unknown key train.lr: it is optimizer.learning_rate here"),
        ("train.max_train_epochs=3", "unknown key train.max_train_epochs: kohya's max_train_epochs is train.epochs here"),
        ("optimiser.unet_lr=1e-4", "unknown key optimiser; did you mean optimizer?"),
        ("train.zzz=3", "unknown key train.zzz; `sdlora settings train` lists the keys of [train]"),
        ("train.warmup_stepz=3", "unknown key train.warmup_stepz; did you mean optimizer.warmup_steps?"),
        ("zzz.zzz=3", "unknown key zzz; the sections are base, data, cache, lora,"),
        ("model_arguments.vae=x", "unknown key model_arguments.vae: it is base.vae here"),
        ("train.steps=3.5", "train.steps = 3.5: must be a whole number, for example 300"),
        ("train.steps=many", "train.steps = 'many': must be a whole number, for example 300"),
        ("lora.alpha=0", "lora.alpha = 0: must be more than 0"),
        ("data.flip=1", "data.flip = 1: must be true or false"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate = 'fast': must be a number, for example 0.5"),
        ("train.seed=4294967296", "train.seed = 4294967296: must be less than 4294967296"),
        ("data.crop=left", "data.crop = 'left': must be 'center', 'random' or 'salient'"),
        ("data.trigger=''", "data.trigger = '': must not be empty"),
        ("data.alpha_background=red", "data.alpha_background = 'red': must be a colour in hexadecimal"),
        ("data.caption_extension=a/b", "data.caption_extension = 'a/b': must be a file extension, for example .txt"),
        ("output.path=x.ckpt", "output.path = 'x.ckpt': must end in .safetensors"),
        ("output.tags=a", "output.tags = 'a': must be a list"),
    ],
)  # fmt: skip
def test_what_is_said_about_a_wrong_key_or_value(override: str, message: str) -> None:
    assert any(message in problem for problem in problems_of(None, *NEEDED, override))


def test_a_configuration_of_kohyas_trainer_is_answered_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "kohya.toml"
    file.write_text("network_dim = 8\n[training_arguments]\nmax_train_steps = 100\ncolor_aug = true\n")
    assert problems_of(file, *NEEDED) == [
        f"{file}:1: unknown key network_dim: kohya's network_dim is lora.rank here",
        f"{file}:2: unknown key training_arguments; the sections are {', '.join(SECTION_NAMES)}",
        f"{file}:3: unknown key training_arguments.max_train_steps: kohya's max_train_steps is train.steps here",
        f"{file}:4: unknown key training_arguments.color_aug: color_aug of kohya's trainer is not supported yet",
    ]


def test_kohyas_names_have_one_answer_each() -> None:
    tables = [set(ABBREVIATIONS), set(ELSEWHERE), set(UNNECESSARY), set(NOT_SUPPORTED)]
    tables.append({setting.kohya for setting in all_settings() if setting.kohya})
    assert sum(map(len, tables)) == len(set.union(*tables)) > 190
    assert set(SET_KEYS) <= set(KEYS)


def test_settings_are_listed_by_section_and_by_name() -> None:
    assert [section.name for section in select_sections("data")] == ["data", "data.sets"]
    text = reference_text(select_sections("lora.rank"))
    assert text.startswith("[lora]\n\nlora.rank (default 16)\n    Rank of ")
    assert text.endswith("whole number, at least 1, at most 1024 | affects the weights | kohya: network_dim")
    with pytest.raises(ConfigError, match=r"no section or setting lore; did you mean lora\?"):
        select_sections("lore")


def test_the_command_prints_settings(sdlora) -> None:
    answer = json.loads(sdlora("settings", "lora", "--json").stdout)
    rank = next(setting for setting in answer["settings"] if setting["key"] == "rank")
    assert (rank["default"], rank["kohya"], rank["affects"], rank["required"]) == (16, "network_dim", "weights", False)
    assert {setting["section"] for setting in answer["settings"]} == {"lora", "lora.rules"}
    assert "output.path (required)" in sdlora("settings").stdout
    wrong = sdlora("settings", "lore")
    assert (wrong.returncode, wrong.stderr) == (1, "error: no section or setting lore; did you mean lora?\n")


def test_a_run_of_another_version_is_one_clear_difference() -> None:
    identity = RunIdentity(config={"train.steps": "9"}, dataset="d", base="b")
    assert RunIdentity.from_json(identity.to_json()) == identity
    earlier = json.loads(identity.to_json())
    del earlier["format"]
    differences = identity.differences(RunIdentity.from_json(json.dumps(earlier | {"config": {"train.rank": "3"}})))
    assert differences == ["another version of sdlora, with other settings, made it"]
