"""Wrong commands of every verb: each has its exit code and its line, none a traceback, none leaves a file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdlora.cli import app
from tests.conftest import run_sdlora, write_images

GOOD = '[data]\nimages = "ds"\ntrigger = "zorb"\n[output]\npath = "x.safetensors"\n'
FILES = {
    "good.toml": GOOD,
    "broken.toml": "[data",
    "key.toml": GOOD + "[train]\nstps = 3\n",
    "value.toml": GOOD + '[train]\nsteps = "many"\n',
    "bare.toml": '[data]\nimages = "ds"\n[output]\npath = "x.safetensors"\n',
    "k.toml": '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "ds"\n',
    "kwrong.toml": '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "ds"\nnum_repeat = 3\n',
    "trainer.toml": "network_dim = 8\n",
    "text.txt": "no LoRA",
    "text.safetensors": "no safetensors at all, but some text",
    "empty.safetensors": "",
}
TRAIN = "train --images ds --trigger zorb"

WRONG = [
    # What a new user met: each answer says what to do.
    ("train --images ds --trigger zorb --out x", 1, "output.path = 'x': must end in .safetensors"),
    ("train ds", 1, "ds is a folder; use --images ds"),
    ("train ds --trigger zorb", 1, "ds is a folder; use --images ds"),
    ("train k.toml", 1, "k.toml is a kohya dataset file: data.dataset_config=k.toml"),
    (f"{TRAIN} train.steps=300.0", 1, "train.steps = 300.0: must be a whole number, for example 300"),
    ("train --images ds", 1, "error: data.trigger is missing; name the trigger word: --trigger WORD"),
    ("generate x --base runwayml/sd", 1, "sdlora downloads nothing: give the path of the file or folder"),
    # train: usage
    ("train", 2, "name a CONFIG.toml, or give --images DIR and --trigger WORD"),
    ("train --imags ds", 2, "No such option"),
    ("train --images", 2, "requires an argument"),
    (f"{TRAIN} --steps many", 2, "Invalid value for '--steps'"),
    (f"{TRAIN} --steps 3.5", 2, "Invalid value for '--steps'"),
    (f"{TRAIN} --rank x", 2, "Invalid value for '--rank'"),
    (f"{TRAIN} --learning-rate fast", 2, "Invalid value for '--learning-rate'"),
    (f"{TRAIN} --batch-size 1.5", 2, "Invalid value for '--batch-size'"),
    (f"{TRAIN} --resolution big", 2, "Invalid value for '--resolution'"),
    # train: values
    (f"{TRAIN} --steps 0", 1, "train.steps = 0: must be at least 1"),
    (f"{TRAIN} --steps -3", 1, "train.steps = -3: must be at least 1"),
    (f"{TRAIN} --rank 0", 1, "lora.rank = 0: must be at least 1"),
    (f"{TRAIN} --rank 100000", 1, "lora.rank = 100000: must be at most 1024"),
    (f"{TRAIN} --batch-size 0", 1, "train.batch_size = 0: must be at least 1"),
    (f"{TRAIN} --learning-rate -1", 1, "optimizer.learning_rate = -1.0: must be at least 0"),
    (f"{TRAIN} --learning-rate 1", 1, "optimizer.learning_rate = 1.0: must be less than 1"),
    (f"{TRAIN} --learning-rate nan", 1, "optimizer.learning_rate"),
    (f"{TRAIN} --resolution 8", 1, "data.resolution = 8: expected pixels from 64 to 4096"),
    (f"{TRAIN} lora.alpha=0", 1, "lora.alpha = 0: must be more than 0"),
    (f"{TRAIN} lora.alpha=x", 1, "lora.alpha = 'x': must be a number"),
    (f"{TRAIN} data.flip=1", 1, "data.flip = 1: must be true or false"),
    (f"{TRAIN} data.crop=left", 1, "must be 'center', 'random' or 'salient'"),
    (f"{TRAIN} optimizer.name=lino", 1, "did you mean lion?"),
    (f"{TRAIN} optimizer.schedule=step", 1, "optimizer.schedule = 'step': must be"),
    (f"{TRAIN} train.seed=-1", 1, "train.seed = -1: must be at least 0"),
    (f"{TRAIN} train.precision=fp16", 1, "train.precision = 'fp16': must be"),
    (f"{TRAIN} output.metadata=all", 1, "output.metadata = 'all': must be"),
    (f"{TRAIN} output.tags=a", 1, "output.tags = 'a': must be a list"),
    (f"{TRAIN} data.max_token_length=80", 1, "data.max_token_length = 80: must be"),
    (f"{TRAIN} data.tag_dropout=1", 1, "data.tag_dropout = 1: must be less than 1"),
    (f"{TRAIN} data.caption_extension=a/b", 1, "must be a file extension, for example .txt"),
    (f"{TRAIN} data.alpha_background=red", 1, "must be a colour in hexadecimal"),
    (f"{TRAIN} data.min_bucket_reso=128 data.max_bucket_reso=64", 1, "data.min_bucket_reso = 128 is more than"),
    (f"{TRAIN} data.caption_template=x", 1, "data.caption_template = 'x' lacks {trigger}"),
    (f"{TRAIN} base.clip_skip=99", 1, "base.clip_skip = 99: must be at most 24"),
    (f"{TRAIN} base.attention=flash", 1, "base.attention = 'flash': must be"),
    ("train --images '' --trigger zorb", 1, "data.images = '': must not be empty"),
    ("train --images ds --trigger ''", 1, "data.trigger = '': must not be empty"),
    ("train --images ds --trigger 'a  b'", 1, "has white space that no caption keeps; write 'a b'"),
    (f"train --images ds --trigger {'z' * 61}", 1, "must have at most 60 characters"),
    # train: keys
    (f"{TRAIN} train.stps=3", 1, "unknown key train.stps; did you mean train.steps?"),
    (f"{TRAIN} network_dim=8", 1, "kohya's network_dim is lora.rank here"),
    (f"{TRAIN} train.network_dim=8", 1, "kohya's network_dim is lora.rank here"),
    (f"{TRAIN} train.lr=1e-4", 1, "it is optimizer.learning_rate here"),
    (f"{TRAIN} train.color_aug=true", 1, "color_aug of kohya's trainer is not supported yet"),
    (f"{TRAIN} train.max_train_epochs=3", 1, "kohya's max_train_epochs is train.epochs here"),
    (f"{TRAIN} optimiser.name=adamw", 1, "unknown key optimiser; did you mean optimizer?"),
    (f"{TRAIN} zzz.zzz=3", 1, "unknown key zzz; the sections are base, data,"),
    (f"{TRAIN} train=3", 1, "expected section.key=value, for example train.steps=300"),
    (f"{TRAIN} =3", 1, "expected section.key=value"),
    (f"{TRAIN} .=3", 1, "expected section.key=value"),
    ("train good.toml more", 1, "'more': expected section.key=value"),
    ("train data.images=ds data.trigger=zorb", 1, "output is missing; name the file to write: --out"),
    ("train data.trigger=zorb output.path=x.safetensors", 1, "data.images is missing: name the folder"),
    ("train --trigger zorb", 1, "data.images is missing: name the folder"),
    # train: an option and a setting
    (f"{TRAIN} data.trigger=other", 1, "--trigger zorb and data.trigger=other contradict each other; keep one"),
    (f"{TRAIN} --steps 3 train.steps=4", 1, "--steps 3 and train.steps=4 contradict each other"),
    (f"{TRAIN} data.images=other", 1, "--images ds and data.images=other contradict each other"),
    (f"{TRAIN} --base mini base.path=x", 1, "--base mini and base.path=x contradict each other"),
    (f"{TRAIN} --out a.safetensors output.path=b.safetensors", 1, "--out a.safetensors and output.path=b.safetensors"),
    (f"{TRAIN} --rank 4 lora.rank=8", 1, "--rank 4 and lora.rank=8 contradict each other"),
    (f"{TRAIN} data.dataset_config=k.toml", 1, "data.dataset_config and data.images are both set"),
    # train: files
    ("train none.toml", 1, "none.toml: no such configuration file"),
    ("train nowhere", 1, "nowhere: no such configuration file"),
    ("train broken.toml", 1, "broken.toml: not valid TOML"),
    ("train key.toml", 1, "key.toml:7: unknown key train.stps; did you mean train.steps?"),
    ("train value.toml", 1, "value.toml:7: train.steps = 'many': must be a whole number"),
    ("train bare.toml", 1, "bare.toml:1: data.trigger is missing; name the trigger word"),
    ("train trainer.toml", 1, "trainer.toml:1: unknown key network_dim: kohya's network_dim is lora.rank here"),
    ("train ds/0.png", 1, "ds/0.png: cannot be read as UTF-8 text"),
    ("train --images nowhere --trigger zorb", 1, "nowhere: no such folder"),
    ("train --images text.txt --trigger zorb", 1, "text.txt: not a folder"),
    ("train --images bare --trigger zorb", 1, "bare: no image among its 0 files"),
    ("train --images dsbad --trigger zorb", 1, "0.png: empty file"),
    (f"{TRAIN} --base nowhere", 1, "nowhere: no such base"),
    (f"{TRAIN} --base text.txt", 1, "text.txt"),
    (f"{TRAIN} --base ds", 1, "ds: not a checkpoint"),
    (f"{TRAIN} --base text.safetensors", 1, "text.safetensors"),
    (f"{TRAIN} data.metadata=none.csv", 1, "none.csv"),
    (f"{TRAIN} data.mask=files", 1, "none of the 1 images has a mask"),
    ("train --trigger zorb --out x.safetensors data.dataset_config=kwrong.toml", 1, "did you mean num_repeats?"),
    ("train --trigger zorb --out x.safetensors data.dataset_config=none.toml", 1, "none.toml: no such"),
    ("train --trigger zorb --out x.safetensors data.dataset_config=ds", 1, "ds: a folder, not a file"),
    ("train --trigger zorb --out x.safetensors data.dataset_config=text.txt", 1, "text.txt: not valid TOML"),
    # lint
    ("lint", 2, "Missing argument: name DIR or CONFIG.toml, or give --images DIR"),
    ("lint ds --fix", 2, "--fix and --out COPY go together"),
    ("lint ds --out copy", 2, "--fix and --out COPY go together"),
    ("lint ds --sheet x.jpg", 2, "does not end in .png"),
    ("lint ds --resolution 8", 2, "Invalid value for '--resolution'"),
    ("lint ds --resolution x", 2, "Invalid value for '--resolution'"),
    ("lint nowhere", 1, "nowhere: no such folder"),
    ("lint none.toml", 1, "none.toml: no such configuration file"),
    ("lint broken.toml", 1, "broken.toml: not valid TOML"),
    ("lint ds data.reslution=64", 1, "did you mean data.resolution?"),
    ("lint ds more", 1, "'more': expected section.key=value"),
    ("lint ds --base nowhere", 1, "nowhere: no such base"),
    ("lint ds --images other", 1, "ds and data.images=other contradict each other; keep one of them"),
    ("lint ds --trigger a data.trigger=b", 1, "--trigger a and data.trigger=b contradict each other"),
    ("lint ds --resolution 64 data.resolution=128", 1, "--resolution 64 and data.resolution=128 contradict"),
    ("lint kwrong.toml", 1, "did you mean num_repeats?"),
    ("lint data.trigger=zorb", 1, "data.images is missing: name the folder"),
    ("lint dsbad", 1, "0.png: empty file"),
    ("lint bare", 1, "bare: no image among its 0 files"),
    # generate
    ("generate", 2, "there is no prompt"),
    ("generate x --size big", 2, "expected WIDTHxHEIGHT, for example 128x160"),
    ("generate x --size 100", 1, "size 100x100: width and height must be multiples of 8 pixels on mini"),
    ("generate x --steps 0", 2, "Invalid value for '--steps'"),
    ("generate x --count 0", 2, "Invalid value for '--count'"),
    ("generate x --count x", 2, "Invalid value for '--count'"),
    ("generate x --precision fp8", 2, "is not auto, float32, bfloat16 or float16"),
    ("generate x --strip --count 2", 2, "a strip shows one seed"),
    ("generate x --cfg high", 2, "Invalid value for '--cfg'"),
    ("generate x --clip-skip 99", 1, "base.clip_skip = 99: must be at most 24"),
    ("generate x --prediction v", 1, "base.prediction = 'v': must be"),
    ("generate x --attention flash", 1, "base.attention = 'flash': must be"),
    ("generate x --base nowhere", 1, "nowhere: no such base"),
    ("generate x --base ''", 1, "base.path = '': must not be empty"),
    ("generate x --lora none.safetensors", 1, "none.safetensors: no such file"),
    ("generate x --lora text.safetensors", 1, "text.safetensors"),
    ("generate x --lora empty.safetensors", 1, "empty.safetensors"),
    ("generate x --vae none.safetensors", 1, "none.safetensors"),
    ("generate x --sampler magic", 1, "'magic' is unknown"),
    # inspect, convert, export
    ("inspect", 2, "Missing argument"),
    ("inspect nowhere", 1, "nowhere: no such"),
    ("inspect text.safetensors", 1, "text.safetensors"),
    ("inspect empty.safetensors", 1, "empty.safetensors"),
    ("convert", 2, "Missing argument"),
    ("convert a.safetensors b.safetensors", 2, "Missing option"),
    ("convert a.safetensors b.safetensors --to peft --precision x", 2, "is not a precision"),
    ("convert none.safetensors b.safetensors --to peft", 1, "none.safetensors: no such file"),
    ("convert text.safetensors b.safetensors --to peft", 1, "text.safetensors"),
    ("export", 2, "Missing argument"),
    ("export x.safetensors", 2, "Missing option"),
    ("export none.safetensors --civitai up --no-previews", 1, "none.safetensors: no such file"),
    ("export none.safetensors --civitai up --size big", 2, "expected WIDTHxHEIGHT"),
    # metadata, caption, cache, settings, the command itself
    ("metadata show", 2, "Missing argument"),
    ("metadata shw x", 2, "No such command"),
    ("metadata show none.safetensors", 1, "none.safetensors: no such file"),
    ("metadata show text.safetensors", 1, "text.safetensors"),
    ("metadata set none.safetensors a --out b.safetensors", 2, "expected KEY=VALUE"),
    ("metadata set none.safetensors a=b", 2, "Missing option"),
    ("metadata set none.safetensors a=b --out b.safetensors", 1, "none.safetensors: no such file"),
    ("metadata redact none.safetensors --out b.safetensors", 1, "none.safetensors: no such file"),
    ("caption", 2, "Missing argument"),
    ("caption ds", 2, "Missing option"),
    ("caption ds --model nowhere", 1, "nowhere"),
    ("caption ds --model ds", 1, "ds"),
    ("caption ds --model ds --kind gpt", 2, "is not auto"),
    ("cache info --folder nowhere", 1, "nowhere: no such folder"),
    ("cache prune --folder nowhere", 1, "nowhere: no such folder"),
    ("cache prune --all --max-gigabytes 1", 2, "give --max-gigabytes or --all"),
    ("cache prune --max-gigabytes -1", 2, "Invalid value for '--max-gigabytes'"),
    ("settings lore", 1, "no section or setting lore; did you mean lora?"),
    ("settings lora.rnk", 1, "lora.rnk"),
    ("quickstart", 1, "not here; run quickstart in a clone of the repository"),
    ("paint", 2, "No such command"),
    ("trian ds", 2, "No such command"),
    ("--verson", 2, "No such option"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the commands run in."""
    folder = tmp_path_factory.mktemp("wrong")
    write_images(folder / "ds", 1)
    write_images(folder / "dsbad", 1)
    (folder / "dsbad" / "0.png").write_bytes(b"")
    (folder / "bare").mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def files_in(folder: Path) -> dict[str, bytes | None]:
    return {str(file): file.read_bytes() if file.is_file() else None for file in sorted(folder.rglob("*"))}


def plain(text: str) -> str:
    """Without the frame that usage errors are drawn in."""
    return " ".join(text.replace("│", " ").replace("\\", "/").split())


def test_they_are_many() -> None:
    assert len({command for command, _, _ in WRONG}) == len(WRONG) >= 120


@pytest.mark.parametrize(("command", "code", "line"), WRONG, ids=[command for command, _, _ in WRONG])
def test_a_wrong_command(place: Path, command: str, code: int, line: str) -> None:
    before = files_in(place)
    result = CliRunner().invoke(app, shlex.split(command), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    assert line in plain(result.output), result.output
    assert "Traceback" not in result.output
    assert files_in(place) == before


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [case for case in WRONG if case[0] in ("train ds", "train k.toml", "train", "lint kwrong.toml", "paint")],
)
def test_a_wrong_command_in_a_process_of_its_own(place: Path, command: str, code: int, line: str) -> None:
    before = files_in(place)
    result = run_sdlora(*shlex.split(command), cwd=place, timeout=60)
    assert result.returncode == code
    assert line in plain(result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert files_in(place) == before
    assert os.listdir(place)
