"""Whether the installed torch can use this machine's NVIDIA card, and the command that installs one that can."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

INDEX = "https://download.pytorch.org/whl"
RECENT_CUDA, RECENT_DRIVER = "cu130", 580
"""PyTorch's stable build for cards from Turing (GTX 16, RTX 20, T4) on, and the oldest driver that CUDA 13.0 runs with."""
OLDER_CUDA, OLDER_DRIVER = "cu126", 525
"""Its last build for Maxwell, Pascal and Volta (GTX 900 and 10, P100, V100), and the oldest driver of CUDA 12."""
_CARDS = Path("/proc/driver/nvidia/gpus")
"""Has a folder for each card that the driver of Linux found."""
_HIDDEN = ("", "-1", "none")


def why_not_cuda() -> str | None:
    """A sentence on an NVIDIA card that torch cannot use, with the command that helps; None where nothing is amiss.

    Cards hidden by ``CUDA_VISIBLE_DEVICES`` are not missed. torch is imported only where there is a card or its driver,
    and no process is started.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip().lower() in _HIDDEN or not has_nvidia_driver():
        return None
    import torch

    version, built_for = torch.__version__.partition("+")[0], torch.version.cuda
    if torch.version.hip is not None:
        return None
    if built_for is None:
        return (
            f"this machine has an NVIDIA driver, but torch {torch.__version__} is a build for the CPU, which is many times "
            f"slower; install one for CUDA: {install_command(RECENT_CUDA, version)}"
        )
    if not torch.cuda.is_available():
        return (
            f"this machine has an NVIDIA driver, but torch {torch.__version__} finds no card that it can use: CUDA "
            f"{built_for} needs driver {_oldest_driver(built_for)} or newer. Update the driver, or install "
            f"the build for older ones: {install_command(OLDER_CUDA, version)}"
        )
    capability, least = torch.cuda.get_device_capability(), _least_capability(torch.cuda.get_arch_list())
    if capability < least:
        return (
            f"{torch.cuda.get_device_name()} is too old for torch {torch.__version__}: it has compute capability "
            f"{capability[0]}.{capability[1]}, and the build needs {least[0]}.{least[1]}; install the build for older "
            f"cards: {install_command(OLDER_CUDA, version)}"
        )
    return None


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is installed; on Linux, whether it found a card. Looks at files alone."""
    if sys.platform == "darwin":
        return False
    if shutil.which("nvidia-smi"):
        return True
    if sys.platform == "win32":
        return (Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvml.dll").exists()
    try:
        return any(_CARDS.iterdir())
    except OSError:
        return False


def install_command(build: str, version: str) -> str:
    """Installs torch ``version`` in ``build``, such as ``cu130``, in the place of another build of the same version."""
    return f'pip install --upgrade "torch=={version}" --index-url {INDEX}/{build}'


def _oldest_driver(cuda: str) -> int:
    return OLDER_DRIVER if cuda.partition(".")[0] == "12" else RECENT_DRIVER


def _least_capability(builds: list[str]) -> tuple[int, int]:
    """The least of ``sm_75``, ``compute_120`` and the like, as torch states what it was built for; (0, 0) for none."""
    numbers = [name.rpartition("_")[2].rstrip("af") for name in builds]
    return min(((int(digits[:-1]), int(digits[-1])) for digits in numbers if digits.isdigit()), default=(0, 0))
