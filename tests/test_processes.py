"""Several processes train what one trains: ``--processes``, what is refused, and what is left when one of them ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import sdlora as package
from sdlora.errors import ConfigError, Interrupted, ResumeError
from sdlora.formats.safetensors_file import read_header
from sdlora.training.checkpoint import RunFolder
from sdlora.training.interruption import interrupt_flag
from sdlora.training.processes import check_agreement, check_batch, check_devices, described_processes
from sdlora.training.step_shape import StepShape
from tests.conftest import ROOT
from tests.training_runs import config_for, everything, overrides, same_but_for_times

STEPS = 20
SCRIPT = ROOT / "configs" / "several-machines.sbatch"
GUARD = """
import os, sys

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime"}


def refuse(event, arguments):
    if event not in CHANGES and not (event == "open" and arguments[2] and arguments[2] & WRITES):
        return
    path = os.path.abspath(os.fsdecode(arguments[0])) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
    if path.startswith(os.environ["GUARDED"]):
        os.write(2, f"error: wrote {path} ({event})\\n".encode())
        os._exit(9)


if os.environ.get("RANK") == os.environ["GUARDED_RANK"]:
    sys.addaudithook(refuse)
"""
"""Ends a process of the guarded rank where it writes into the guarded folder."""


def settings(base: Path, folder: Path, output: Path) -> list[str]:
    more = (
        "train.precision=float32",
        "output.precision=float32",
        f"train.steps={STEPS}",
        "validation.every=5",
        "output.log=true",
    )
    sets = folder / "sets.json"
    if not sets.exists():
        sets.write_text(json.dumps(everything(folder)))
    return overrides(base, None, output, *more, *json.loads(sets.read_text()))


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sdlora", "train", "--processes", "2", *arguments]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def pair(tiny_base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """Output and answer of a run of two processes, the second of which must not write beside the output."""
    guard, out = tmp_path_factory.mktemp("guard"), tmp_path_factory.mktemp("out")
    (guard / "sitecustomize.py").write_text(GUARD)
    path = os.pathsep.join(filter(None, [str(guard), os.environ.get("PYTHONPATH")]))
    guarded = {"GUARDED": str(out), "GUARDED_RANK": "1", "PYTHONPATH": path}
    run = start(*settings(tiny_base, folder, out / "x.safetensors"), "--json", **guarded)
    answer, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return out / "x.safetensors", json.loads(answer)


def test_two_processes_train_what_one_trains(
    pair: tuple[Path, dict[str, object]], tiny_base: Path, folder: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "x.safetensors"
    single = package.train(config_for(tiny_base, None, alone, *settings(tiny_base, folder, alone))).result
    assert pair[1]["loss"] == pytest.approx(single.loss, rel=1e-5)
    measured = [float(read_header(file, ResumeError).metadata["sdlora_validation_loss"]) for file in (alone, pair[0])]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
    one, two = load_file(alone), load_file(pair[0])
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)
    logs = [file.with_suffix(".log.csv").read_text().splitlines() for file in (alone, pair[0])]
    assert [line.partition(",")[0] for line in logs[0]] == [line.partition(",")[0] for line in logs[1]]


def test_a_killed_process_ends_the_run_which_resumes_to_the_same_bytes(
    pair: tuple[Path, dict[str, object]], tiny_base: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    command = settings(tiny_base, folder, output)
    killed = start(*command)
    wait_for_step(output, 2, killed)
    process_of_rank(killed, "1").kill()
    said = killed.communicate(timeout=300)[1]
    assert killed.returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert [line for line in errors if line.startswith("error: rank 1 of 2 processes was killed by SIGKILL")], said
    assert "Traceback" not in said
    checkpoint = sorted(output.with_suffix(".resume").iterdir())[-1]
    step = int(checkpoint.stem.removeprefix("step-"))
    assert f"stopped after step {step} of {STEPS}; run the same command to resume" in said
    assert not list(tmp_path.rglob("*.partial*"))

    resumed = start(*command, "--json")
    answer, said = resumed.communicate(timeout=300)
    assert json.loads(answer)["resumed_from"] == step, said
    same_but_for_times(pair[0], output)


def test_the_script_for_slurm_starts_the_same_run_on_two_machines(
    pair: tuple[Path, dict[str, object]], tiny_base: Path, folder: Path, tmp_path: Path
) -> None:
    """Two machines that are both this one: ``srun`` runs the task of each with what Slurm says in it."""
    tools, output = tmp_path / "tools", tmp_path / "x.safetensors"
    tools.mkdir()
    task = 'SLURM_NODEID=$node SLURM_PROCID=$node SLURM_STEP_NUM_TASKS=2 SLURM_NNODES=2 "$@"'
    write_tool(
        tools / "srun",
        f'shift\nfor node in 1 0; do {task} & tasks+=($!); done\nfor task in "${{tasks[@]}}"; do wait $task; done',
    )
    write_tool(tools / "scontrol", '[ "$*" = "show hostnames node[1-2]" ] && printf "127.0.0.1\\nnode2\\n"')
    write_tool(tools / "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "1"}
    environment = os.environ | slurm | {"PATH": f"{tools}:{os.environ['PATH']}"}
    environment.pop("OMP_NUM_THREADS", None)
    result = subprocess.run(
        ["bash", SCRIPT, *settings(tiny_base, folder, output), "--json"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == STEPS  # Rank 0 alone prints its answer.
    same_but_for_times(pair[0], output)


def write_tool(file: Path, body: str) -> None:
    file.write_text(f"#!/usr/bin/env bash\nset -e\n{body}\n")
    file.chmod(0o755)


def test_the_script_for_slurm_asks_for_one_task_on_each_machine() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    asked = re.findall(r"^#SBATCH --(\S+)", SCRIPT.read_text(), re.MULTILINE)
    assert {"ntasks-per-node=1", "requeue"} <= set(asked)


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_at_once_and_what_they_saved_is_enough_for_one(
    pair: tuple[Path, dict[str, object]], tiny_base: Path, folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    command = settings(tiny_base, folder, output)
    stopped = start(*command)
    wait_for_step(output, 2, stopped)
    stopped.send_signal(signal.SIGINT)
    said = stopped.communicate(timeout=300)[1]
    assert stopped.returncode == 130
    done = re.findall(rf"stopped after step (\d+) of {STEPS}; run the same command to resume", said)
    assert len(done) == 1, said
    said = list[str]()
    result = package.train(config_for(tiny_base, None, output, *command), say=said.append).result
    assert result.resumed_from == int(done[0])
    assert [line for line in said if "shared among 1, earlier among 2 processes" in line]
    one, two = load_file(output), load_file(pair[0])
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)


def wait_for_step(output: Path, step: int, run: subprocess.Popen[str]) -> None:
    """Until a checkpoint of ``step`` or a later one is there."""
    folder = output.with_suffix(".resume")
    while not any(int(file.stem[5:]) >= step for file in folder.glob("step-*.safetensors")):
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.01)


def process_of_rank(run: subprocess.Popen[str], rank: str) -> psutil.Process:
    return next(child for child in psutil.Process(run.pid).children() if child.environ()["RANK"] == rank)


def test_another_number_of_processes_goes_on_and_chooses_its_own_shape(
    finished: tuple[Path, Path], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What three processes left has no other draws; only that each computed fewer images at once is not taken over."""
    output, stop, said = tmp_path / "x.safetensors", threading.Event(), list[str]()
    config = config_for(tiny_base, finished[0], output)
    save = RunFolder.save
    with monkeypatch.context() as patch:
        one = StepShape(micro_batch=1, checkpointing=False)
        patch.setattr(RunFolder, "save", lambda folder, state: save(folder, replace(state, processes=3, shape=one)))
        with pytest.raises(Interrupted):
            package.train(config, stop=stop, on_step=lambda record: stop.set())
    assert package.train(config, say=said.append).result.resumed_from == 2
    assert [line for line in said if "shared among 1, earlier among 3 processes" in line]
    same_but_for_times(finished[1], output)


def test_sigterm_may_come_twice_and_the_state_is_still_saved() -> None:
    with interrupt_flag() as flag:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert flag.is_set()
        assert flag.terminated


GROUP = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = two: expected the number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0: expected the number of processes"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
        ({**GROUP, "LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        (
            {"SLURM_STEP_NUM_TASKS": "4"},
            r"srun started 4 processes \(SLURM_STEP_NUM_TASKS\), and each would train on its own",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "accelerate launch was asked for several"),
    ],
)
def test_a_wrong_description_of_the_processes_is_refused(environment: dict[str, str | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        described_processes({name: value for name, value in environment.items() if value is not None})


def test_processes_that_are_described_are_counted() -> None:
    assert described_processes(GROUP) == 2
    assert described_processes({}) == 1
    # torchrun under srun, one for each machine.
    assert described_processes({**GROUP, "SLURM_STEP_NUM_TASKS": "2"}) == 2
    assert described_processes({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}) == 1


def test_a_group_of_another_size_than_the_environment_says_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process has computed alone before, as accelerate remembers; now it is one of two."""
    for name, value in GROUP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="WORLD_SIZE = 2, but this process computes in a group of 1"):
        package.train(config_for(tmp_path, tmp_path, tmp_path / "x.safetensors"))


def test_processes_that_see_other_things_are_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class OfTwo:
        num_processes = 2

    def gathered(seen: list[Any], own: Any) -> None:
        seen[:] = [("node1", {"the images": "a", "the newest checkpoint": "50"}), own]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    check_agreement({"the images": "a", "the newest checkpoint": "50"}, OfTwo())  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check_agreement({"the images": "a", "the newest checkpoint": "0"}, OfTwo())  # type: ignore[arg-type]
    (problem,) = caught.value.problems
    assert problem.startswith(
        "rank 1 differs from rank 0 in the newest checkpoint, and is on another machine, which needs"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    devices = torch.cuda.device_count()
    command = [sys.executable, "-m", "sdlora", "train", "--processes", str(devices + 1)]
    images = ["--images", str(ROOT / "datasets" / "pixel"), "--trigger", "x", "--out", str(tmp_path / "x.safetensors")]
    result = subprocess.run([*command, *images], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {devices + 1} processes on a machine with {devices} GPU")


def test_each_process_of_a_machine_needs_a_gpu() -> None:
    check_devices(GROUP | {"LOCAL_WORLD_SIZE": "4"}, devices=4)
    with pytest.raises(ConfigError, match="4 processes on a machine with 1 GPU: each needs its own; start at most 1"):
        check_devices(GROUP | {"LOCAL_WORLD_SIZE": "4"}, devices=1)
    with pytest.raises(ConfigError, match="3 processes on a machine with 2 GPUs"):
        check_devices(GROUP | {"LOCAL_RANK": "2"}, devices=2)


def test_a_batch_is_shared_by_at_most_as_many_processes_as_it_has_images() -> None:
    assert check_batch(4, 2) == check_batch(4, 1) == check_batch(2, 2) == []
    (line,) = check_batch(5, 2)
    assert "train.batch_size = 5 is shared by 2 processes" in line
    assert "4 and 6 are shared evenly" in line
    with pytest.raises(ConfigError, match=r"shared by 4 processes.*start at most 2, or set train\.batch_size=4"):
        check_batch(2, 4)
