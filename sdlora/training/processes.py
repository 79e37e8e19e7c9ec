"""The processes that share the steps of a run: joining them, adding up what each has, and noticing that one has ended.

``torchrun`` and ``sdlora train --processes`` describe each process in environment variables: RANK, WORLD_SIZE, LOCAL_RANK,
LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from ..errors import ConfigError, ProcessLostError

PAGE = "docs/several-devices.md has the commands"
DESCRIBED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that every process of a group needs."""
STARTERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
"""Variable with the number of processes that another program started -> that program. None sets ``WORLD_SIZE``."""
LONGEST_WAIT = timedelta(hours=2)
"""How long a process waits for the others: the first one draws samples meanwhile, or loads from a slow disk."""


def join_processes() -> Accelerator:
    """Join the processes that share this run, as the environment describes them; a process alone is a group of one.

    Waits until all of them are there. Without a GPU they compute on the CPU.

    Raises:
        ConfigError: the environment contradicts itself, the machine has too few GPUs, or the group is not as large as it
            says.
    """
    wanted = described_processes(os.environ)
    on_gpus = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    if wanted > 1 and on_gpus:
        check_devices(os.environ, devices=torch.cuda.device_count())
    # accelerate joins a group on CPUs only where it is asked to, and else computes alone without a word.
    on_cpus = wanted > 1 and not on_gpus and not torch.xpu.is_available()
    try:
        accelerator = Accelerator(
            cpu=on_cpus,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
    except torch.distributed.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConfigError(
            f"the processes of this run do not reach each other at {place} ({reason(error)}); MASTER_ADDR is the machine of "
            f"the first of them, and MASTER_PORT a port that is free there; {PAGE}"
        ) from None
    if accelerator.num_processes != wanted:
        raise ConfigError(
            f"WORLD_SIZE = {wanted}, but this process computes in a group of {accelerator.num_processes}; start it by "
            f"sdlora train --processes {wanted}, or by torchrun; {PAGE}"
        )
    return accelerator


def described_processes(environment: Mapping[str, str]) -> int:
    """How many processes share this run, as ``environment`` describes it.

    Raises:
        ConfigError: it describes several in part only, or shows that another program started several, each of which would
            train on its own.
    """
    text = environment.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE = {text}: expected the number of processes that share this run, at least 1")
    if int(text) > 1:
        missing = [name for name in DESCRIBED if name not in environment]
        if missing:
            raise ConfigError(
                f"WORLD_SIZE = {text}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: what "
                f"starts several processes sets them, as torchrun does; unset WORLD_SIZE for one process; {PAGE}"
            )
    elif "WORLD_SIZE" not in environment:
        for name, starter in STARTERS.items():
            count = environment.get(name, "1")
            if count.isdecimal() and int(count) > 1:
                raise ConfigError(
                    f"{starter} started {count} processes ({name}), and each would train on its own; start one for each "
                    f"machine, and in it torchrun -m sdlora train …; {PAGE}"
                )
        if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
            raise ConfigError(
                "accelerate launch was asked for several processes and started one, as it does with --cpu; use "
                f"sdlora train --processes N; {PAGE}"
            )
    return int(text)


def check_devices(environment: Mapping[str, str], *, devices: int) -> None:
    """Whether this machine has a GPU for each of its processes.

    Raises:
        ConfigError: it has fewer; the message says how many.
    """
    here = int(environment.get("LOCAL_WORLD_SIZE", int(environment["LOCAL_RANK"]) + 1))
    if here > devices:
        have = "1 GPU" if devices == 1 else f"{devices} GPUs"
        raise ConfigError(
            f"{here} processes on a machine with {have}: each needs its own; start at most {devices}, or set "
            "ACCELERATE_USE_CPU=true to compute on the CPU"
        )


def check_batch(batch_size: int, processes: int) -> list[str]:
    """What to say of a batch that ``processes`` share: nothing where each has the same number of its images.

    Raises:
        ConfigError: there are more processes than images.
    """
    if processes > batch_size:
        raise ConfigError(
            f"train.batch_size = {batch_size}: the batch of a step is shared by {processes} processes, which are more "
            f"than its images; start at most {batch_size}, or set train.batch_size={processes}"
        )
    if batch_size % processes == 0:
        return []
    even = batch_size // processes * processes
    return [
        f"train.batch_size = {batch_size} is shared by {processes} processes: some compute one image more in each step, and "
        f"the others wait; {even} and {even + processes} are shared evenly"
    ]


def add_up(tensor: Tensor) -> None:
    """Replace ``tensor`` in each process by the sum over all processes, which call this in the same order.

    Raises:
        ProcessLostError: another process has ended.
    """
    with _noticing_loss():
        torch.distributed.all_reduce(tensor)


def same_in_all(tensor: Tensor) -> None:
    """Replace the contiguous ``tensor``, of any dtype, in each process by that of the first. Raises as ``add_up``."""
    with _noticing_loss():
        torch.distributed.broadcast(tensor.view(torch.uint8), 0)


def wait_for_all(accelerator: Accelerator) -> None:
    """Wait until every process has called this. Raises as ``add_up``."""
    with _noticing_loss():
        accelerator.wait_for_everyone()


def check_agreement(facts: Mapping[str, str], accelerator: Accelerator) -> None:
    """Whether every process sees the same ``facts``, each a name and its value. Raises as ``add_up`` too.

    Raises:
        ConfigError: one sees others than the first; the message names them, in every process.
    """
    if accelerator.num_processes == 1:
        return
    seen: list[tuple[str, dict[str, str]]] = [("", {})] * accelerator.num_processes
    with _noticing_loss():
        torch.distributed.all_gather_object(seen, (socket.gethostname(), dict(facts)))
    first = seen[0][1]
    problems = [
        f"rank {number} differs from rank 0 in {name}"
        + (", and is on another machine, which needs the same files and the same folder for the output" if far else "")
        for number, (host, own) in enumerate(seen)
        for far in [host != seen[0][0]]
        for name in first
        if own.get(name) != first[name]
    ]
    if problems:
        raise ConfigError(problems)


@contextmanager
def _noticing_loss() -> Generator[None]:
    """Within the block, processes wait for each other, and nothing else is done.

    gloo raises plain ``RuntimeError``, NCCL subclasses of it.
    """
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(f"another process of this run has ended ({reason(error)})") from None


def reason(error: Exception) -> str:
    """The first sentence of a message of torch's, without the line of its source."""
    text = str(error).partition("\n")[0]
    text = text.partition("] ")[2] if text.startswith("[") else text
    return text.partition(". ")[0].strip()[:200]
