"""sdlora lint as a command and as a function: answers, exit codes, wrong uses, the summary and the progress bar."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sdlora as sdlora_package
from sdlora.cli import app
from sdlora.config.loading import load_config
from sdlora.lint.report import report_lines, summary_lines
from tests.conftest import ROOT
from tests.lint_sets import CONFIG, add, clean, content, lint_folder, noise


def test_the_command(sdlora, tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    good = sdlora("lint", "set", "--trigger", "zorb", "--sheet", "sheet.png")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.startswith("6 images: no problems found\n")
    assert "128 x 128         6     0%     0%" in good.stdout
    assert good.stdout.endswith("sheet.png: contact sheet\n")
    (folder / "clean0.png").write_bytes(b"")
    (folder / "clean1.txt").write_text("a tree")
    (tmp_path / "run.toml").write_text(CONFIG.format(more='images = "set"'))
    for arguments in (("set", "--trigger", "zorb"), ("run.toml",)):
        bad = sdlora("lint", *arguments, "--json")
        assert (bad.returncode, bad.stderr) == (1, "")
        answer = json.loads(bad.stdout)
        assert set(answer) >= {"images", "findings", "counts", "tags", "buckets", "base", "resolution"}
        assert answer["images"] == 6
        assert answer["counts"] == {"errors": 1, "warnings": 0, "notes": 1}
        empty = os.path.join("set", "clean0.png")
        assert [(f["severity"], f["code"], f["file"]) for f in answer["findings"]] == [
            ("error", "image-empty", empty),
            ("note", "trigger-absent", os.path.join("set", "clean1.txt")),
        ]
        assert all(set(f) == {"code", "severity", "file", "message", "remedy"} for f in answer["findings"])
    text = sdlora("lint", "run.toml", "data.trigger=art")
    assert text.returncode == 1
    for part in ("error image-empty (1)", f"  {empty}: empty file (0 bytes)", "  -> replace or remove it"):
        assert part in text.stdout
    assert "warning trigger-common (1)" in text.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("set", "--fix"), 2, "--fix and --out COPY go together"),
        (("set", "--out", "copy"), 2, "--fix and --out COPY go together"),
        (("set", "--sheet", "sheet.jpg"), 2, "does not end in .png"),
        ((), 2, "Missing argument"),
        (("none.toml",), 1, "none.toml: no such configuration file"),
        (("set", "data.reslution=64"), 1, "did you mean data.resolution?"),
        (("set", "--base", "nowhere"), 1, "nowhere: no such base"),
    ],
)
def test_wrong_use(sdlora, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    clean(tmp_path / "set", 1)
    before = content(tmp_path)
    result = sdlora("lint", *arguments)
    assert result.returncode == code, result.stderr
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
    assert content(tmp_path) == before


def test_lint_takes_the_arguments_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    clean(tmp_path / "set")
    kohya = '[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = "set"\n'
    (tmp_path / "k.toml").write_text(kohya)
    (tmp_path / "k.json").write_text('{"datasets": [{"resolution": 128, "subsets": [{"image_dir": "set"}]}]}')
    for arguments in (
        ["set"],
        ["data.images=set"],
        ["--images", "set", "output.path=x.safetensors", "train.steps=3"],
        ["k.toml"],
        ["k.json"],
        ["data.dataset_config=k.toml"],
    ):
        result = CliRunner().invoke(app, ["lint", *arguments, "--trigger", "zorb"])
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("6 images: no problems found\n"), arguments


def test_captions_without_the_trigger_are_one_finding(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set", 9)
    report = lint_folder(folder, trigger="rsop")
    (finding,) = [finding for finding in report.findings if finding.code == "trigger-absent"]
    assert (finding.file, finding.message) == (str(folder), "9 captions lack 'rsop'; it will be put in front")
    for number in range(7):
        (folder / f"clean{number}.txt").write_text(f"rsop, thing {number}")
    report = lint_folder(folder, trigger="rsop")
    (finding,) = [finding for finding in report.findings if finding.code == "trigger-absent"]
    assert finding.message == "2 captions lack 'rsop' (clean7.png, clean8.png); it will be put in front"


def test_a_missing_folder_is_a_finding(sdlora, tmp_path: Path) -> None:
    result = sdlora("lint", "nowhere", "--json")
    assert result.returncode == 1
    answer = json.loads(result.stdout)
    assert [(f["code"], f["file"]) for f in answer["findings"]] == [("folder-missing", "nowhere")]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.md").touch()
    (finding,) = lint_folder(tmp_path / "bare").findings
    assert finding.message == "no image among its 1 files"


def test_the_summary_is_short(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    for number in range(30):
        add(folder, f"small{number}.png", noise(f"s{number}", 32, 32))
    report = lint_folder(folder)
    lines = summary_lines(report)
    assert lines[0] == "36 images: 30 warnings"
    assert len(lines) == 5
    assert lines[-1].endswith("27 more; `sdlora lint` lists them all")
    full = report_lines(report)
    assert "  and 10 more; --json lists them all" in full
    assert sum("enlarged" in line for line in full) == 20


def test_a_progress_bar_shows_on_a_terminal(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    clean(tmp_path / "set")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sdlora.cli", "lint", "set", "--trigger", "zorb", "--json"]
    made = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # The end of a terminal.
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert b"Examining images" in shown
    assert b"6/6" in shown
    assert json.loads(made.stdout)["images"] == 6


def test_as_a_function(tmp_path: Path) -> None:
    folder = clean(tmp_path / "set")
    assert sdlora_package.lint_dataset(folder, trigger="zorb").findings == ()
    (tmp_path / "run.toml").write_text(CONFIG.format(more=f'images = "{folder}"'))
    assert sdlora_package.lint_dataset(tmp_path / "run.toml").findings == ()
    config = load_config(tmp_path / "run.toml", ["data.trigger=art"])
    assert "trigger-common" in {finding.code for finding in sdlora_package.lint_dataset(config).findings}


def test_lint_needs_neither_diffusers_nor_transformers(sdlora, tmp_path: Path) -> None:
    clean(tmp_path / "set")
    code = (
        "import sys; from sdlora.lint.run import *; from sdlora.progress import Silence;"
        "lint_data(*linted_sections(['set'], trigger='zorb'), progress=Silence());"
        "print('diffusers' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout.split() == ["False", "False"]
