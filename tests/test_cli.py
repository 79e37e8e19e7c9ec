"""The command line as users meet it: real processes, exit codes, one line for each fault, nothing half-written."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from sdlora.cli import app
from sdlora.cli.settings_options import merged
from sdlora.config.sections import Config
from sdlora.errors import SdloraError
from sdlora.training.run import train
from tests.conftest import write_images

SURFACE = {
    "train": {
        *("arguments", "images", "trigger", "base", "out", "restart", "extend", "allow_device_change", "as_json"),
        *("steps", "epochs", "rank", "batch_size", "learning_rate", "resolution", "preset", "explain"),
        *("from_kohya", "processes"),
    },
    "generate": {
        *("prompt", "base", "lora", "negative", "seed", "steps", "cfg", "size", "count", "sampler", "schedule"),
        "guidance_rescale",
        "source",
        "strip",
        *(
            "precision",
            "out",
            "as_json",
            "clip_skip",
            "vae",
            "text_encoder",
            "prediction",
            "attention",
            "vae_tiling",
            "batch_size",
            "lora_dir",
            "wildcards",
            "prompts",
            "preview",
            "image",
            "strength",
            "mask",
            "mask_blur",
            "hires",
            "hires_strength",
            "hires_steps",
            "hires_upscaler",
            "embedding",
        ),
    },
    "list": {"folder", "search", "base", "duplicates", "with_hashes", "as_json"},
    "sweep": {"file", "settings", "out", "engine", "jobs", "processes", "retry", "check", "as_json"},
    "grid": {
        *(
            "prompt",
            "x",
            "y",
            "z",
            "base",
            "lora",
            "lora_dir",
            "wildcards",
            "negative",
            "seed",
            "steps",
            "cfg",
            "size",
            "sampler",
        ),
        *("schedule", "guidance_rescale", "batch_size", "embedding"),
        *("image", "strength", "mask", "mask_blur", "hires", "hires_strength", "hires_steps", "hires_upscaler"),
        *("scale", "precision", "vae_tiling", "clip_skip", "vae", "out", "as_json"),
    },
    "inspect": {"file", "with_hashes", "as_json"},
    "convert": {"source", "target", "to", "base", "precision", "as_json"},
    "merge": {"loras", "out", "method", "rank", "energy", "density", "seed", "base", "precision", "as_json"},
    "resize": {"source", "target", "rank", "energy", "ratio", "base", "precision", "as_json"},
    "average": {"sources", "out", "base", "precision", "as_json"},
    "extract": {"base", "tuned", "target", "rank", "energy", "precision", "as_json"},
    "bake": {"base", "loras", "out", "as_json"},
    "diff": {"first", "second", "base", "as_json"},
    "interference": {"loras", "base", "as_json"},
    "export": {
        *(
            "lora",
            "civitai",
            "base",
            "prompt",
            "previews",
            "negative",
            "weight",
            "seed",
            "steps",
            "cfg",
            "size",
            "as_json",
        ),
    },
    "metadata show": {"file", "as_json"},
    "metadata set": {"file", "pairs", "out"},
    "metadata redact": {"file", "out"},
    "caption": {"folder", "model", "kind", "trigger", "caption_extension", "as_json"},
    "cache info": {"folder", "as_json"},
    "cache prune": {"max_gigabytes", "everything", "folder", "as_json"},
    "plan": {"arguments", "images", "trigger", "resolution", "base", "gpu", "probe", "as_json"},
    "init": {"folder", "out", "base", "trigger", "preset", "as_json"},
    "quickstart": {"out", "as_json"},
    "settings": {"section", "as_json"},
    "lint": {
        *(
            "arguments",
            "images",
            "trigger",
            "resolution",
            "caption_extension",
            "base",
            "fix",
            "out",
            "sheet",
            "as_json",
        ),
    },
}


def test_the_surface_changes_only_on_purpose() -> None:
    assert {name: {p.name for p in command.params} for name, command in verbs().items()} == SURFACE


def one_line(result, code: int, *parts: str) -> None:
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]
    assert result.stdout == ""


def width_of(file: Path) -> int:
    with Image.open(file) as image:
        return image.width


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def test_bad_images_and_captions(sdlora, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 1)
    before = files_in(tmp_path)
    train = ("train", "--images", folder, "--trigger", "zorb")
    faults = {
        b"": "empty file",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 40: "0.png: ",
        (folder / "0.png").read_bytes()[:80]: "truncated image",
    }
    for data, message in faults.items():
        (folder / "0.png").write_bytes(data)
        one_line(sdlora(*train), 1, "0.png", message)
    write_images(folder, 1)
    (folder / "0.txt").write_text("word " * 300)
    one_line(sdlora(*train), 1, "0.txt", "300 words")
    (folder / "0.txt").write_bytes(b"caf\xe9")
    one_line(sdlora(*train), 1, "0.txt", "not UTF-8")
    one_line(sdlora("train", "--images", tmp_path / "none", "--trigger", "zorb"), 1, "none", "no such folder")
    assert files_in(tmp_path) == before


def test_bad_configurations(sdlora, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        '[data]\nimages = "x"\ntrigger = "y"\n[train]\nstps = 3\n[output]\npath = "o.safetensors"\n'
    )
    one_line(sdlora("train", "run.toml"), 1, "run.toml:5", "unknown key train.stps; did you mean train.steps?")
    one_line(sdlora("train", "none.toml"), 1, "none.toml", "no such configuration file")
    assert files_in(tmp_path) == {"run.toml"}


def test_bad_lora_files(sdlora, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b"\x50\0\0\0\0\0\0\0{")
    generate = ("generate", "a fox", "--base", tiny_base, "--steps", 1)
    one_line(sdlora(*generate, "--lora", "cut.safetensors"), 1, "cut.safetensors", "truncated")
    one_line(sdlora("inspect", "cut.safetensors"), 1, "cut.safetensors", "truncated")
    one_line(sdlora(*generate, "--lora", "none.safetensors:0.5"), 1, "none.safetensors", "no such file")
    one_line(sdlora("generate", "a fox", "--base", tmp_path / "nowhere"), 1, "nowhere", "no such base")
    assert files_in(tmp_path) == {"cut.safetensors"}


@pytest.mark.parametrize(
    "arguments",
    [("train",), ("generate",), ("generate", "x", "--size", "big"), ("paint",), ("generate", "x", "--steps", "0")],
)
def test_usage_errors_have_exit_code_two(sdlora, arguments: tuple[str, ...]) -> None:
    result = sdlora(*arguments)
    assert result.returncode == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.stderr


def test_json_is_one_object_and_the_image_contains_its_recipe(sdlora, tiny_base: Path, tmp_path: Path) -> None:
    result = sdlora("generate", "a fox", "--base", tiny_base, "--steps", 2, "--seed", 3, "--count", 2, "--json")
    answer = json.loads(result.stdout)
    assert answer["seed"] == 3
    assert answer["images"] == ["out/00001-3-a-fox.png", "out/00002-4-a-fox.png"]
    with Image.open(tmp_path / answer["images"][1]) as image:
        parameters = image.text["parameters"]  # ty: ignore[unresolved-attribute]
    assert parameters.startswith(
        "a fox\nSteps: 2, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 5, Seed: 4,"
    )
    assert "Size: 64x64, Model: tiny, RNG: CPU" in parameters
    assert str(tmp_path) not in parameters


def test_train_then_generate_then_inspect(sdlora, tiny_base: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "my images", 3)
    (tmp_path / "other").mkdir()
    made = sdlora(
        *("train", "--images", folder, "--trigger", "123", "--base", tiny_base, "--out", "out/x.safetensors"),
        *("train.steps=3", "train.batch_size=2", "--json"),
    )
    assert made.returncode == 0, made.stderr
    answer = json.loads(made.stdout)
    assert (answer["output"], answer["steps"], answer["samples"]) == ("out/x.safetensors", 3, "out/x.samples.png")
    assert width_of(tmp_path / "out/x.samples.png") > 3 * 64
    report = json.loads(sdlora("inspect", "out/x.safetensors", "--json").stdout)
    assert (report["kind"], report["family"], report["trigger"]) == ("lora", "sd1", ["123"])
    assert set(report) >= {
        "dialect",
        "modules",
        "rank",
        "alpha",
        "dtype",
        "prediction",
        "problems",
        "hashes",
        "metadata",
    }
    strip = sdlora(
        *("generate", "a", "b", "--base", tiny_base, "--lora", "out/x.safetensors:0.5", "--strip", "--steps", 1),
        *("--out", "strip.png"),
    )
    assert strip.stdout.strip() == "strip.png", strip.stderr
    assert width_of(tmp_path / "strip.png") > 3 * 128


def test_checkpoints_are_inspected_too(sdlora, tiny_base: Path) -> None:
    report = json.loads(sdlora("inspect", tiny_base, "--json").stdout)
    assert (report["kind"], report["family"], report["dialect"], report["prediction"]) == (
        *("checkpoint", "sd1", "diffusers", "epsilon"),
    )
    assert "checkpoint, sd1" in sdlora("inspect", "mini").stdout


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "sdlora", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("sdlora ")


def test_version(sdlora) -> None:
    from sdlora._version import __version__

    assert sdlora("--version").stdout.strip() == f"sdlora {__version__}"


def verbs() -> dict[str, Any]:
    commands = dict(get_command(app).commands)  # ty: ignore[unresolved-attribute]
    for group in ("metadata", "cache"):
        commands |= {f"{group} {name}": command for name, command in commands.pop(group).commands.items()}
    return commands


@pytest.mark.parametrize("verb", SURFACE)
def test_help_of_every_verb_has_examples_that_parse(verb: str) -> None:
    command = verbs()[verb]
    lines = [line for line in command.epilog.split("\n\n") if line.startswith("sdlora ")]
    assert lines
    for line in lines:
        words = shlex.split(line)[1:]
        assert words[: len(verb.split())] == verb.split()
        command.make_context(verb, words[len(verb.split()) :])


def test_help_of_train_has_groups_and_names_the_settings() -> None:
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "120", "TERM": "dumb"})
    for part in ("Data", "LoRA", "Training", "Output", "--batch-size", "--learning-rate", "sdlora settings"):
        assert part in result.output


def test_shells_complete_verbs() -> None:
    env = {"_SDLORA_COMPLETE": "complete_bash", "COMP_WORDS": "sdlora tr", "COMP_CWORD": "1"}
    assert CliRunner().invoke(app, [], prog_name="sdlora", env=env).output.split() == ["train"]


def test_options_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[tuple[str, str], object] = {("--steps", "train.steps"): 3, ("--rank", "lora.rank"): None}
    assert merged(options, ["train.steps=3", "lora.rank=2"]) == ["train.steps=3", "lora.rank=2", "train.steps=3"]
    with pytest.raises(SdloraError, match=r"^--steps 3 and train\.steps=4 contradict each other; keep one of them$"):
        merged(options, ["train.steps=4"])
    got: list[Config] = []

    def stopped(config: Config, **_: object) -> None:
        got.append(config)
        raise SdloraError("stopped")

    monkeypatch.setattr("sdlora.training.run.train", stopped)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    given = "train --images ~/set --trigger 12 --steps 7 --rank 4 --batch-size 2 --learning-rate 1e-3 --resolution 128"
    CliRunner().invoke(app, given.split())
    config = got[0]
    values = (config.train.steps, config.lora.rank, config.train.batch_size, config.optimizer.learning_rate)
    assert values == (7, 4, 2, 1e-3)
    assert (config.data.resolution, config.data.trigger, config.data.images) == (128, "12", str(tmp_path / "set"))
    assert config.output.path == "out/set.safetensors"


def test_train_in_python_takes_the_path_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('[data]\nimages = "none"\ntrigger = "z"\n[output]\npath = "x.safetensors"\n')
    for file in (tmp_path / "x.toml", str(tmp_path / "x.toml")):
        with pytest.raises(SdloraError, match="no such folder"):
            train(file)
    with pytest.raises(SdloraError, match=r"expected a configuration .* or the path of its TOML file, not dict"):
        train({})  # ty: ignore[invalid-argument-type]
