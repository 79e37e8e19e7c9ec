"""Starting and ending processes together, with small programs in the place of training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdlora.errors import ConfigError
from sdlora.training import launch
from sdlora.training.launch import Ended, run_processes
from tests.conftest import ROOT

HEAD = "import os, signal, sys, time; rank = int(os.environ['RANK']); say = lambda text: print(text, file=sys.stderr)\n"


def ended(program: str, count: int = 2) -> Ended:
    return run_processes(count, [sys.executable, "-c", HEAD + program])


def test_the_first_process_is_heard_and_the_others_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    assert ended("print(rank); say(f'progress of {rank}')", 3) == Ended(code=0)
    assert capfd.readouterr() == ("0\n", "progress of 0\n")


def test_each_process_knows_its_place(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')"
    written = f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert ended(written, 3).code == 0
    placed = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [place[:5] for place in placed] == [[str(rank), str(rank), "3", "3", "127.0.0.1"] for rank in range(3)]
    assert len({place[5] for place in placed}) == 1


def test_an_error_of_every_process_is_one_message(capfd: pytest.CaptureFixture[str]) -> None:
    assert ended("say('error: no such folder'); sys.exit(1)", 3) == Ended(code=1)
    assert capfd.readouterr().err == "error: no such folder\n"


def test_an_error_of_another_process_is_reported_once_with_its_rank(capfd: pytest.CaptureFixture[str]) -> None:
    """The first one notices that another has ended, and says what it saved; see ``ProcessLostError``."""
    program = """
if rank == 1:
    say('error: out of memory in step 5')
    sys.exit(1)
time.sleep(0.3)
say('error: stopped after step 4')
sys.exit(3)
"""
    assert ended(program, 3) == Ended(code=1, problems=("rank 1 of 3 processes: out of memory in step 5",))
    assert capfd.readouterr().err == ""  # SIGTERM came first: this one does not save anything on it.


def test_a_fault_of_the_program_is_shown_with_its_end() -> None:
    code, problems = vars(ended("assert rank != 1; time.sleep(60)")).values()
    assert code == 1
    assert problems[0] == "rank 1 of 2 processes ended with exit code 1"
    assert problems[-1] == "AssertionError"


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_named_and_the_others_end(killed: int) -> None:
    found = ended(f"os.kill(os.getpid(), signal.SIGKILL) if rank == {killed} else time.sleep(60)")
    assert found.code == 1
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"rank {killed} of 2 processes was killed by SIGKILL; if the memory was full")


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it waits within NCCL for one that is no longer there."""
    monkeypatch.setattr(launch, "PATIENCE", 0.5)
    began = time.monotonic()
    program = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60) if rank == 0 else (say('error: x'), sys.exit(1))"
    )
    assert ended(program) == Ended(code=1, problems=("rank 1 of 2 processes: x",))
    assert time.monotonic() - began < 30


SAVING = """
def save(*_):
    time.sleep(0.3)
    open(os.path.join(sys.argv[1], f'saved-{rank}'), 'a').write('x')
    say('stopped after step 4')
    os._exit(143)
signal.signal(signal.SIGTERM, save)
open(os.path.join(sys.argv[1], f'ready-{rank}'), 'w')
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_passed_on_once_and_what_it_starts_is_waited_for(
    number: int, code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def press() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=press).start()
    found = run_processes(2, [sys.executable, "-c", HEAD + SAVING, str(tmp_path)])
    assert found == Ended(code=code)
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == ["x", "x"]
    assert capfd.readouterr().err == "stopped after step 4\n"


def test_a_run_that_is_complete_when_the_signal_comes_is_a_success(tmp_path: Path) -> None:
    def press() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=press).start()
    finished = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0 if rank == 0 else 143))\n"
    ready = f"open(os.path.join({str(tmp_path)!r}, f'ready-{{rank}}'), 'w')\n"
    assert ended(finished + ready + "time.sleep(60)") == Ended(code=0)


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    program = f"""
import sys
from sdlora.training.launch import run_processes
child = {HEAD!r} + "from sdlora.training.launch import end_with_launcher; end_with_launcher()" + {SAVING!r}
run_processes(2, [sys.executable, "-c", child, {str(tmp_path)!r}])
"""
    launcher = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for(tmp_path, "ready-*")
    launcher.kill()
    launcher.wait()
    wait_for(tmp_path, "saved-*")


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 30
    while len(list(folder.glob(pattern))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_group_is_started_within_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--processes 4 starts its processes itself; leave it out under torchrun"):
        run_processes(4, [sys.executable])
