"""Runs on clusters: a real one of Ray with two workers, and submitit's own executor in place of Slurm's queue."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import sdlora as package
from sdlora.errors import ConfigError
from sdlora.progress import Silence
from sdlora.sweeps.engines import check_engine, engine_for
from sdlora.sweeps.jobs import ANSWER_NAME, Ended, run_jobs
from sdlora.sweeps.processes import STOP_NAME
from sdlora.sweeps.ray_engine import RayEngine
from sdlora.sweeps.slurm_engine import SlurmEngine, SlurmHandle
from tests.sweep_jobs import WAITING, Seen, StopWhen, job
from tests.test_sweep import write_sweep

NEVER = threading.Event()
HERE = {"cluster": "local", "timeout_min": 5}
"""Options with which submitit runs jobs on this machine, in processes of its own."""


@pytest.mark.parametrize(("engine", "needs"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_names_its_extra(
    engine: str, needs: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sdlora.sweeps.engines.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"--engine {engine} needs {needs}: pip install 'sdlora\[{engine}\]'"):
        check_engine(engine, {})
    with pytest.raises(ConfigError, match="--engine cloud: expected one of local, ray, slurm"):
        check_engine("cloud", {})


def test_wrong_options_of_ray_are_found_before_a_cluster_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.sweeps.engines.find_spec", lambda name: name)
    with pytest.raises(ConfigError) as caught:
        check_engine("ray", {"ray": {"num_cpus": "two", "gpus": 1, "address": "auto"}})
    first, second = caught.value.problems
    assert first == '[ray] num_cpus = "two": wrong type'
    assert second.startswith("[ray] gpus = 1: unknown; expected address, ")


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(SlurmHandle, "apart", 0.1)
    if os.name != "posix":
        pytest.skip("submitit sends signals to processes")
    return pytest.importorskip("submitit")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of Ray: two workers with one processor each, on this machine."""
    pytest.importorskip("ray")
    started = importlib.import_module("ray.cluster_utils").Cluster()
    for _ in range(2):
        started.add_node(num_cpus=1, object_store_memory=80_000_000)
    yield started.address
    started.shutdown()


@pytest.fixture
def ray_engine(cluster: str) -> Iterator[RayEngine]:
    engine = RayEngine({"address": cluster})
    yield engine
    engine.close()


def test_both_workers_of_ray_are_used_and_a_failure_stops_no_other(ray_engine: RayEngine, tmp_path: Path) -> None:
    """Each worker has room for one job, and each of these ends only when the other has started."""
    meet = "import pathlib, time\npathlib.Path('here').touch()\n"
    meet += "while not pathlib.Path('../{}/here').exists(): time.sleep(0.01)\n"
    jobs = [
        job(tmp_path, "a", meet.format("b") + "print('met')"),
        job(tmp_path, "b", meet.format("a") + "raise SystemExit(7)"),
        job(tmp_path, "c", "print('later')"),
    ]
    seen = Seen()
    run_jobs(jobs, ray_engine, seen, at_once=3, stop=NEVER)
    assert seen.codes == {"a": 0, "b": 7, "c": 0}
    assert [(tmp_path / name / ANSWER_NAME).read_text() for name in "ac"] == ["met\n", "later\n"]


def test_a_stop_lets_tasks_of_ray_save_and_withdraws_those_that_wait(ray_engine: RayEngine, tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, WAITING) for name in "abc"]
    seen = Seen()
    stop = StopWhen(tmp_path / "a" / "started", tmp_path / "b" / "started")
    run_jobs(jobs, ray_engine, seen, at_once=3, stop=stop)
    assert (seen.codes["a"], seen.codes["b"]) == (130, 130)
    assert seen.ends["c"].code is None
    assert (tmp_path / "a" / "saved").exists()
    assert (tmp_path / "b" / "saved").exists()
    assert not (tmp_path / "c" / "started").exists()
    assert not list(tmp_path.glob(f"*/{STOP_NAME}"))


def test_a_task_of_ray_whose_worker_is_killed_starts_again(ray_engine: RayEngine, tmp_path: Path) -> None:
    """The process that Ray calls is killed; its job saves, and the second attempt finds what was saved."""
    code = "import pathlib\nif pathlib.Path('saved').exists(): raise SystemExit(0)\n" + WAITING
    handle = ray_engine.submit(job(tmp_path, "a", code))
    _wait_for(tmp_path / "a" / "started")
    (running,) = [process for process in psutil.process_iter(["cmdline"]) if code in (process.info["cmdline"] or ())]
    parent = running.parent()
    assert parent is not None
    parent.kill()
    assert _end_of(handle).code == 0
    assert (tmp_path / "a" / "saved").exists()


def test_a_sweep_on_ray_has_the_table_of_one_here(cluster: str, tiny_base: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path, tiny_base, "good", "other", steps=2)
    file.write_text(f"{file.read_text()}\n[ray]\naddress = {json.dumps(cluster)}\n")
    report = package.sweep(file, out=tmp_path / "out", engine="ray", progress=Silence())
    assert [(run.state, run.steps) for run in report.runs] == [("done", 2)] * 2
    assert all((tmp_path / "out" / (run.file or "")).is_file() for run in report.runs)


def test_a_cluster_that_is_not_there_is_said(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"--engine ray: no cluster at 127\.0\.0\.1:1"):
        engine_for("ray", {"ray": {"address": "127.0.0.1:1"}}, jobs=None, processes=1, runs=1, folder=tmp_path)


def test_jobs_of_slurm_fail_apart_and_save_when_stopped(submitit: Any, tmp_path: Path) -> None:
    engine = SlurmEngine(HERE, tmp_path)
    seen = Seen()
    jobs = [job(tmp_path, "good", "print('done')"), job(tmp_path, "bad", "raise SystemExit(7)")]
    run_jobs(jobs, engine, seen, at_once=2, stop=NEVER)
    assert seen.codes == {"good": 0, "bad": 7}
    assert (tmp_path / "good" / ANSWER_NAME).read_text() == "done\n"
    seen = Seen()
    run_jobs([job(tmp_path, "a", WAITING)], engine, seen, at_once=1, stop=StopWhen(tmp_path / "a" / "started"))
    assert seen.codes == {"a": 130}
    assert (tmp_path / "a" / "saved").exists()


def test_a_job_of_slurm_whose_time_is_over_saves_and_is_queued_again(submitit: Any, tmp_path: Path) -> None:
    """Slurm sends SIGUSR2 before the time is over; submitit queues what ``checkpoint`` returns."""
    code = "import pathlib\nif pathlib.Path('saved').exists(): print('resumed'); raise SystemExit(0)\n" + WAITING
    handle = SlurmEngine(HERE, tmp_path).submit(job(tmp_path, "a", code))
    _wait_for(tmp_path / "a" / "started")
    (task,) = psutil.Process(int(handle.job_id)).children()
    task.send_signal(signal.SIGUSR2)
    assert _end_of(handle).code == 0
    assert (tmp_path / "a" / "saved").exists()
    assert (tmp_path / "a" / ANSWER_NAME).read_text() == "resumed\n"


def test_a_job_that_waits_in_the_queue_is_withdrawn(submitit: Any, tmp_path: Path) -> None:
    """The first queue that a stop meets: nothing of the job has started."""
    engine = SlurmEngine(HERE, tmp_path)
    handle = engine.submit(job(tmp_path, "a", WAITING))
    handle.cancel()
    assert _end_of(handle).code in (None, 130)
    while not handle._submitted.done():  # Nor is anything left running.
        time.sleep(0.05)
    assert not (tmp_path / "a" / STOP_NAME).exists()


def test_what_slurm_cannot_do_is_said(submitit: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--engine slurm: .*tim_min"):
        SlurmEngine({**HERE, "tim_min": 5}, tmp_path)
    if shutil.which("srun") is None:
        with pytest.raises(ConfigError, match='--engine slurm: Could not detect "srun"'):
            SlurmEngine({}, tmp_path)


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.02)


def _end_of(handle: Any) -> Ended:
    deadline = time.monotonic() + 120
    while (end := handle.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return end
