"""Jobs run in order and apart from each other, and none outlives its sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from sdlora.sweeps.jobs import ANSWER_NAME, LOG_NAME, Job, run_jobs
from sdlora.sweeps.processes import LocalEngine, run_job
from tests.conftest import ROOT
from tests.sweep_jobs import WAITING, Seen, StopWhen, job

NEVER = threading.Event()


def test_a_failure_stops_no_other_job_and_each_has_its_own_log_and_answer(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "good", "import os, sys; print(os.getcwd()); print('note', file=sys.stderr)"),
        job(tmp_path, "bad", "raise SystemExit(7)"),
        job(tmp_path, "last", "print('last')"),
    ]
    seen = Seen()
    run_jobs(jobs, LocalEngine(1), seen, at_once=1, stop=NEVER)
    assert seen.begun == ["good", "bad", "last"]
    assert seen.codes == {"good": 0, "bad": 7, "last": 0}
    assert seen.together <= 1
    assert Path((tmp_path / "good" / ANSWER_NAME).read_text().strip()).samefile(tmp_path / "good")
    assert (tmp_path / "good" / LOG_NAME).read_text() == "note\n"
    assert (tmp_path / "last" / ANSWER_NAME).read_text() == "last\n"


def test_a_log_has_all_attempts_and_an_answer_the_last(tmp_path: Path) -> None:
    once = job(tmp_path, "one", "import sys, time; print(1); print('again', file=sys.stderr)")
    for _ in range(2):
        run_jobs([once], LocalEngine(1), Seen(), at_once=1, stop=NEVER)
    assert (tmp_path / "one" / LOG_NAME).read_text() == "again\n" * 2
    assert (tmp_path / "one" / ANSWER_NAME).read_text() == "1\n"


def test_two_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """Each ends only when the other has started, so they do run at once; the third never meets both."""
    meet = "import pathlib, time\npathlib.Path('here').touch()\n"
    meet += "while not pathlib.Path('../{}/here').exists(): time.sleep(0.01)"
    jobs = [job(tmp_path, "a", meet.format("b")), job(tmp_path, "b", meet.format("a")), job(tmp_path, "c", "")]
    seen = Seen()
    run_jobs(jobs, LocalEngine(2), seen, at_once=2, stop=NEVER)
    assert seen.codes == {"a": 0, "b": 0, "c": 0}
    assert seen.together == 2


def test_a_command_that_cannot_be_started_is_a_failure_of_that_job(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    broken = Job(name="none", folder=tmp_path / "none", command=(str(tmp_path / "nothing"),))
    seen = Seen()
    run_jobs([broken, job(tmp_path, "good", "")], LocalEngine(1), seen, at_once=1, stop=NEVER)
    assert seen.codes == {"none": None, "good": 0}
    assert seen.ends["none"].note == "cannot be started: No such file or directory"


def test_a_stop_lets_running_jobs_save_and_starts_no_more(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, WAITING) for name in ("a", "b", "never")]
    seen = Seen()
    stop = StopWhen(tmp_path / "a" / "started", tmp_path / "b" / "started")
    run_jobs(jobs, LocalEngine(2), seen, at_once=2, stop=stop)
    assert seen.codes == {"a": 130, "b": 130}
    assert (tmp_path / "a" / "saved").exists()
    assert (tmp_path / "b" / "saved").exists()
    assert not (tmp_path / "never" / "started").exists()


def test_an_error_of_the_watcher_ends_the_jobs_before_it_is_raised(tmp_path: Path) -> None:
    class Full(Seen):
        def ended(self, job: Job, end) -> None:
            raise OSError(28, "No space left on device")

    waits = "import pathlib, time\nwhile not pathlib.Path('../long/started').exists(): time.sleep(0.01)"
    jobs = [job(tmp_path, "long", WAITING), job(tmp_path, "short", waits)]
    with pytest.raises(OSError, match="No space left"):
        run_jobs(jobs, LocalEngine(2), Full(), at_once=2, stop=NEVER)
    assert (tmp_path / "long" / "saved").exists()


def test_jobs_share_devices_in_turn_and_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    show = (
        "import os, pathlib, time\npathlib.Path('here').touch()\n"
        "while len(list(pathlib.Path('..').glob('*/here'))) < 3: time.sleep(0.01)\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    )
    jobs = [job(tmp_path, name, show) for name in "abc"]
    run_jobs(jobs, LocalEngine(3, ("0", "3")), Seen(), at_once=3, stop=NEVER)
    assert [(tmp_path / name / ANSWER_NAME).read_text() for name in "abc"] == ["0 4\n", "3 4\n", "0 4\n"]


def test_a_job_of_several_processes_has_as_many_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    show = (
        "import os, pathlib, time\npathlib.Path('here').touch()\n"
        "while len(list(pathlib.Path('..').glob('*/here'))) < 2: time.sleep(0.01)\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS'])"
    )
    jobs = [job(tmp_path, name, show) for name in "ab"]
    run_jobs(jobs, LocalEngine(2, ("0", "1", "2", "3"), 2), Seen(), at_once=2, stop=NEVER)
    assert [(tmp_path / name / ANSWER_NAME).read_text() for name in "ab"] == ["0,1 3\n", "2,3 3\n"]


def test_a_job_saves_and_ends_when_the_process_that_runs_it_is_killed(tmp_path: Path) -> None:
    waiting = job(tmp_path, "a", WAITING)
    code = (
        "import sys, pathlib\nfrom sdlora.sweeps.jobs import Job\nfrom sdlora.sweeps.processes import run_job\n"
        "run_job(Job(name='a', folder=pathlib.Path(sys.argv[1]), command=tuple(sys.argv[2:])))"
    )
    runner = subprocess.Popen([sys.executable, "-c", code, str(waiting.folder), *waiting.command], cwd=ROOT)
    _wait_for(waiting.folder / "started")
    (child,) = psutil.Process(runner.pid).children()
    runner.kill()
    runner.wait()
    _wait_for(waiting.folder / "saved")
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


@pytest.mark.skipif(os.name != "posix", reason="signals are sent to processes")
def test_a_cluster_that_interrupts_a_job_lets_it_save(tmp_path: Path) -> None:
    waiting = job(tmp_path, "a", WAITING)

    def interrupt() -> None:
        _wait_for(waiting.folder / "started")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_job(waiting)
    assert (waiting.folder / "saved").exists()


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.01)
