"""Configuration files and overrides: values arrive, and every fault is told with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora.config import Config, load_config
from sdlora.errors import ConfigError

GOOD = """
[data]
images = "pictures"
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
    text = GOOD + '[train]\nsteps = -3\nbatch_sise = 2\nlearning_rate = "fast"\n[lore]\nrank = 4\n'
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), ["nonsense"])
    problems = caught.value.problems
    assert len(problems) == 5
    text = "\n".join(problems)
    assert "run.toml:9: train.steps = -3" in text
    assert "run.toml:10: unknown key train.batch_sise; did you mean train.batch_size?" in text
    assert "run.toml:11: train.learning_rate = 'fast'" in text
    assert "run.toml:12: unknown key lore; did you mean lora?" in text
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
