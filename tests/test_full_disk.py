"""A disk that is full during a run: checkpoints that fail are warnings, and weights are never lost without a word.

The full disk is real: ``RLIMIT_FSIZE`` in a process of its own lets no file grow beyond so many bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sdlora as package
from sdlora.errors import TargetError
from sdlora.training.checkpoint import RunFolder
from tests.conftest import ROOT
from tests.training_runs import STEPS, config_for, overrides, same_but_for_times

pytestmark = pytest.mark.skipif(os.name != "posix", reason="no limit of this kind to set")

LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)

from sdlora.cli import app
app()
"""


def train_limited(bytes_in_a_file: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, str(bytes_in_a_file), "train", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)


def test_checkpoints_that_do_not_fit_are_warnings(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    """The file in half precision fits where no checkpoint does."""
    images, whole = finished
    output = tmp_path / "x.safetensors"
    result = train_limited(whole.stat().st_size + 4096, *overrides(tiny_base, images, output, "cache.disk=false"))
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("cannot be saved (File too large); kept: no checkpoint") == 6
    same_but_for_times(whole, output)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_that_does_not_fit_is_one_line(finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    result = train_limited(4096, *overrides(tiny_base, finished[0], output, "cache.disk=false"))
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("error: ") == 1
    assert f"error: {output}: cannot be written (File too large)" in result.stderr
    assert "Traceback" not in result.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_after_a_failed_last_write_the_same_command_ends_the_run(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, whole = finished
    output = tmp_path / "x.safetensors"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(output))

    with monkeypatch.context() as patch:
        patch.setattr("sdlora.training.exports.write_lora", full)
        with pytest.raises(TargetError, match=rf"No space left.*step-{STEPS:08}\.safetensors.*same command"):
            package.train(config_for(tiny_base, images, output))
    assert not output.exists()
    result = package.train(config_for(tiny_base, images, output)).result
    assert (result.resumed_from, result.loss) == (STEPS, None)
    same_but_for_times(whole, output)
    assert [file.name for file in (tmp_path / "x.resume").iterdir()] == ["last.safetensors"]


def test_the_last_good_checkpoint_stays_and_resumes(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, whole = finished
    output, save = tmp_path / "x.safetensors", RunFolder.save

    def until_full(self: RunFolder, checkpoint: object) -> None:
        if checkpoint.step > 4:
            raise OSError(28, "No space left on device")
        save(self, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", until_full)
        patch.setattr("sdlora.training.exports.write_lora", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(TargetError, match=r"step-00000004\.safetensors"):
            package.train(config_for(tiny_base, images, output))
    assert package.train(config_for(tiny_base, images, output)).result.resumed_from == 4
    same_but_for_times(whole, output)
