"""Captions by local models: missing ones are written, existing ones are never changed, whatever goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdlora.captioning.folder import CaptionReport, caption_folder, write_captions
from sdlora.captioning.models import Captioner
from sdlora.data.images import open_image
from sdlora.errors import CaptionerError, ConfigError, DataError, Interrupted
from sdlora.progress import CallbackProgress, ProgressUpdate, Silence
from tests.conftest import ROOT, write_images


class Colours(Captioner):
    """Says what the mean colour of an image is."""

    def __init__(self) -> None:
        self.seen = 0

    def caption(self, image: Image.Image) -> str:
        self.seen += 1
        return " an image\n of colour {} {} {} ".format(*np.asarray(image).mean((0, 1)).astype(int))


def run(folder: Path, captioner: Colours | None = None, *, trigger: str = "", extension: str = ".txt") -> CaptionReport:
    chosen = captioner or Colours()
    return write_captions(folder, lambda: chosen, trigger=trigger, extension=extension, progress=Silence())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0 to 4, of which 1 and 3 have captions."""
    made = write_images(tmp_path / "ü 空 a b", 5)
    for number in (0, 2, 4):
        (made / f"{number}.txt").unlink()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# The folder


def test_only_missing_captions_are_written(folder: Path) -> None:
    before = contents(folder)
    report = run(folder)
    assert report.written == tuple(str(folder / f"{number}.txt") for number in (0, 2, 4))
    assert (report.present, report.problems) == (2, ())
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"0.txt", "2.txt", "4.txt"}
    assert re.fullmatch(rb"an image of colour \d+ \d+ \d+\n", after["2.txt"])


def test_captions_belong_to_their_images(folder: Path) -> None:
    run(folder)
    for number in (0, 2, 4):
        mean = np.asarray(open_image(folder / f"{number}.png")).mean((0, 1)).astype(int)
        assert (folder / f"{number}.txt").read_text() == "an image of colour {} {} {}\n".format(*mean)


def test_nothing_to_do_loads_no_model(folder: Path) -> None:
    run(folder)

    def load() -> Colours:
        raise AssertionError("a model was loaded")

    report = write_captions(folder, load, trigger="", extension="txt", progress=Silence())
    assert (report.written, report.present, report.problems) == ((), 5, ())


def test_the_trigger_is_put_in_front_of_captions_that_lack_it(folder: Path) -> None:
    run(folder, trigger="zorb")
    assert (folder / "0.txt").read_text().startswith("zorb, an image of")
    for number in (0, 2, 4):
        (folder / f"{number}.txt").unlink()
    run(folder, trigger="Image")
    assert (folder / "0.txt").read_text().startswith("an image of")


def test_subfolders_tables_and_other_extensions(folder: Path) -> None:
    inner = write_images(folder / "10_thing", 2)
    (inner / "0.txt").unlink()
    (inner / "1.txt").rename(inner / "1.caption")
    (folder / "metadata.jsonl").write_text('{"file_name": "4.png", "text": "from a table"}\n')
    report = run(folder)
    assert set(report.written) == {str(folder / name) for name in ("0.txt", "2.txt", "10_thing/0.txt")}
    (problem,) = report.problems
    assert (
        problem
        == f"{inner / '1.png'}: already has a caption in 1.caption; pass --caption-extension .caption, or rename it"
    )
    report = run(folder, extension="caption")
    assert report.written == ()
    assert not list(folder.rglob("4.txt"))


def test_every_image_without_a_caption_is_reported_once_and_the_others_are_done(folder: Path) -> None:
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "1.txt").write_text(" \n")
    (folder / "3.txt").write_bytes("Bär".encode("latin-1"))
    Image.new("RGB", (8, 8)).save(folder / "4.jpg")

    class Mute(Colours):
        def caption(self, image: Image.Image) -> str:
            return " \n" if super().caption(image) and image.size == (8, 8) else "said"

    captioner = Mute()
    before = contents(folder)
    report = run(folder, captioner)
    expected = {
        "0.png": "truncated image",
        "1.txt": "remove it to have one written",
        "3.txt": "remove it to have one written",
        "4.png": "shares its caption file with 4.jpg",
        "4.jpg": "returned no caption",
    }
    assert len(report.problems) == len(expected)
    for name, message in expected.items():
        assert [line for line in report.problems if line.startswith(str(folder / name)) and message in line], name
    assert report.written == (str(folder / "2.txt"),)
    after = contents(folder)
    assert {name: after[name] for name in before} == before


def test_a_caption_that_appears_meanwhile_is_left_alone(folder: Path) -> None:
    class Slow(Colours):
        def caption(self, image: Image.Image) -> str:
            (folder / "2.txt").write_text("by hand")
            return super().caption(image)

    report = run(folder, Slow())
    assert (folder / "2.txt").read_text() == "by hand"
    assert report.written == (str(folder / "0.txt"), str(folder / "4.txt"))
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("links", [True, False])
def test_captions_are_whole_and_never_overwritten_with_and_without_links(
    folder: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def link(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    test_a_caption_that_appears_meanwhile_is_left_alone(folder)


def test_a_disk_that_is_full_leaves_nothing_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = contents(folder)
    monkeypatch.setattr(os, "fsync", fsync)
    report = run(folder)
    assert [problem.rpartition(": ")[2] for problem in report.problems] == ["No space left on device"] * 3
    assert contents(folder) == before


def test_an_interruption_keeps_what_is_written_and_the_same_call_resumes(folder: Path) -> None:
    class Interrupting(Colours):
        def caption(self, image: Image.Image) -> str:
            if self.seen == 1:
                raise KeyboardInterrupt
            return super().caption(image)

    with pytest.raises(Interrupted, match="1 of 3 captions are written; run the same command to resume"):
        run(folder, Interrupting())
    assert (folder / "0.txt").exists()
    assert not (folder / "2.txt").exists()
    captioner = Colours()
    assert len(run(folder, captioner).written) == captioner.seen == 2


def test_a_model_that_fails_is_reported_with_the_image(folder: Path) -> None:
    class Failing(Colours):
        def caption(self, image: Image.Image) -> str:
            raise RuntimeError("out of memory\nTried to allocate")

    with pytest.raises(CaptionerError, match=re.escape("0.png: the model failed on this image: out of memory")):
        run(folder, Failing())


def test_wrong_folders_and_extensions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        run(tmp_path / "none")
    with pytest.raises(DataError, match="no image among its 0 files"):
        run(tmp_path)
    with pytest.raises(ConfigError, match="not a file extension"):
        run(tmp_path, extension="../x")


def test_a_stop_event_ends_the_work_after_the_current_image(folder: Path) -> None:
    stop = threading.Event()

    class Stopping(Colours):
        def caption(self, image: Image.Image) -> str:
            stop.set()
            return super().caption(image)

    with pytest.raises(Interrupted, match="1 of 3 captions are written"):
        write_captions(folder, Stopping, trigger="", extension=".txt", progress=Silence(), stop=stop)
    assert (folder / "0.txt").exists()
    assert not (folder / "2.txt").exists()


def test_the_public_function_captions_a_folder_and_reports_progress(folder: Path, models: dict[str, Path]) -> None:
    updates: list[ProgressUpdate] = []
    report = caption_folder(folder, model=models["blip"], progress=CallbackProgress(updates.append))
    assert report.written == tuple(str(folder / f"{number}.txt") for number in (0, 2, 4))
    assert [(update.done, update.total, update.note) for update in updates[1:]] == [
        (1, 3, "0.txt"),
        (2, 3, "2.txt"),
        (3, 3, "4.txt"),
    ]
    stopped = threading.Event()
    stopped.set()
    (folder / "0.txt").unlink()
    with pytest.raises(Interrupted, match="0 of 1 captions are written"):
        caption_folder(folder, model=models["blip"], progress=Silence(), stop=stopped)
    with pytest.raises(CaptionerError, match="of kind blip, not wd14"):
        caption_folder(folder, model=models["blip"], kind="wd14", progress=Silence())


# The verb


def test_the_verb_as_a_user_runs_it(sdlora, folder: Path, models: dict[str, Path]) -> None:
    (folder / "0.png").write_bytes(b"")
    command = ("caption", folder, "--model", models["blip"], "--trigger", "zorb")
    result = sdlora(*command, "--json")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert (report["kind"], report["present"]) == ("blip", 2)
    assert report["written"] == [str(folder / "2.txt"), str(folder / "4.txt")]
    # On a slow machine, progress is reported too.
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("Captioning: ")]
    assert len(lines) == 1
    assert "0.png" in lines[0]
    assert "Traceback" not in result.stderr
    assert (folder / "2.txt").read_text().startswith("zorb, ")
    (folder / "0.png").unlink()
    again = sdlora(*command)
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.strip() == f"{folder}: 0 captions written, 4 existed before"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("{folder}", "--model", "nowhere"), 1, "nowhere: no such folder"),
        (("nowhere", "--model", "{blip}"), 1, "nowhere: no such folder"),
        (("{folder}", "--model", "{folder}"), 1, "no captioning model"),
        (("{folder}", "--model", "{blip}", "--kind", "wd14"), 1, "of kind blip, not wd14"),
        (("{folder}", "--model", "{blip}", "--kind", "git"), 2, "git"),
        (("{folder}",), 2, "--model"),
    ],
)
def test_wrong_uses_of_the_verb(
    sdlora, folder: Path, models: dict[str, Path], arguments: tuple[str, ...], code: int, message: str
) -> None:
    before = contents(folder)
    result = sdlora("caption", *(argument.format(folder=folder, **models) for argument in arguments))
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(folder) == before


SLOW_CAPTIONER = """
import signal, sys, time
from pathlib import Path
import typer
from sdlora.captioning.folder import write_captions
from sdlora.captioning.models import Captioner
from sdlora.cli.app import guard
from sdlora.progress import Silence

# If the tests run as a background job of a shell, Ctrl-C is ignored from the start.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Slow(Captioner):
    def caption(self, image):
        time.sleep(0.02)
        return "word " * 200

def run():
    write_captions(Path(sys.argv[1]), Slow, trigger="", extension=".txt", progress=Silence())

try:
    guard(run)()
except typer.Exit as exit:
    sys.exit(exit.exit_code)
"""


def test_ctrl_c_and_kill_leave_whole_captions_and_the_command_resumes(tmp_path: Path) -> None:
    """Real processes with a stand-in for the model, interrupted and killed while they write."""
    folder = write_images(tmp_path / "many", 200, sizes=((16, 16),))
    for file in folder.glob("*.txt"):
        file.unlink()
    whole = " ".join(["word"] * 200) + "\n"
    written = 0
    for sent in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_CAPTIONER, folder], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        while len(list(folder.glob("*.txt"))) < written + 5:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(sent)
        _, error = process.communicate(timeout=30)
        written = len(list(folder.glob("*.txt")))
        assert 0 < written < 200
        if sent == signal.SIGINT:
            assert process.returncode == 130
            assert (
                error.strip() == f"interrupted: {written} of 200 captions are written; run the same command to resume"
            )
        assert {file.read_text() for file in folder.glob("*.txt")} == {whole}
    assert len(run(folder).written) == 200 - written
