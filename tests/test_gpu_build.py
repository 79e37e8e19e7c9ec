"""A machine with an NVIDIA card and a build of torch that cannot use it says so, with the command that helps."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import sdlora
from sdlora.base import gpu_build
from sdlora.base.gpu_build import has_nvidia_driver, why_not_cuda
from tests.conftest import ROOT
from tests.training_runs import config_for


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "platform", "linux")


def build(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, hip: str | None = None) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)


def use(monkeypatch: pytest.MonkeyPatch, *, available: bool, capability: tuple[int, int] = (7, 5)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Somewhat")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_120", "sm_75", "sm_90a", "compute_120"])


@pytest.mark.usefixtures("card")
def test_a_build_for_the_cpu_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, "2.13.0+cpu", None)
    said = why_not_cuda()
    assert said is not None
    assert "torch 2.13.0+cpu is a build for the CPU" in said
    assert said.endswith('pip install --upgrade "torch==2.13.0" --index-url https://download.pytorch.org/whl/cu130')


def test_the_command_replaces_the_build_for_the_cpu() -> None:
    """pip upgrades to the greater version, and the label of the build counts."""
    for label in (gpu_build.RECENT_CUDA, gpu_build.OLDER_CUDA):
        assert Version(f"2.13.0+{label}") > Version("2.13.0+cpu") > Version("2.13.0")
        assert Version(f"2.13.0+{label}") in SpecifierSet("==2.13.0")


def test_the_page_has_the_builds_that_the_messages_have_and_the_version_that_is_tested() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    (version,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"torch==([\d.]+)", page)) == {version}
    assert {f"whl/{name}" for name in (gpu_build.RECENT_CUDA, gpu_build.OLDER_CUDA)} < set(re.findall(r"whl/\w+", page))
    assert f"older than {gpu_build.RECENT_DRIVER}" in page
    assert gpu_build.install_command(gpu_build.RECENT_CUDA, version) in page


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("cuda", "driver"), [("13.0", 580), ("13.2", 580), ("12.6", 525)])
def test_a_driver_that_is_too_old_is_named(cuda: str, driver: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, "2.13.0", cuda)
    use(monkeypatch, available=False)
    said = why_not_cuda()
    assert said is not None
    assert f"CUDA {cuda} needs driver {driver} or newer" in said
    assert said.endswith("/cu126")


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("capability", "fits"), [((6, 1), False), ((7, 0), False), ((7, 5), True), ((12, 0), True)])
def test_a_card_that_is_too_old_is_named(
    capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(monkeypatch, "2.13.0+cu130", "13.0")
    use(monkeypatch, available=True, capability=capability)
    said = why_not_cuda()
    if fits:
        assert said is None
    else:
        assert said is not None
        assert said.startswith("NVIDIA Somewhat is too old for torch 2.13.0+cu130: it has compute capability")
        assert "the build needs 7.5" in said
        assert said.endswith("/cu126")


@pytest.mark.usefixtures("card")
def test_rocm_and_hidden_cards_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    build(monkeypatch, "2.13.0+rocm7.2", None, hip="7.2")
    assert why_not_cuda() is None
    build(monkeypatch, "2.13.0+cpu", None)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert why_not_cuda() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert why_not_cuda() is not None


def test_drivers_are_found_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_build, "_CARDS", tmp_path / "gpus")
    monkeypatch.setenv("SYSTEMROOT", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert not has_nvidia_driver()
    (tmp_path / "gpus").mkdir()
    assert not has_nvidia_driver()
    (tmp_path / "gpus" / "0000:01:00.0").mkdir()
    assert has_nvidia_driver()
    monkeypatch.setattr(sys, "platform", "win32")
    assert not has_nvidia_driver()
    (tmp_path / "System32").mkdir()
    (tmp_path / "System32" / "nvml.dll").touch()
    assert has_nvidia_driver()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not has_nvidia_driver()


def test_nothing_is_imported_where_there_is_no_card() -> None:
    code = "\n".join(
        [
            "import sys",
            "from sdlora.base import gpu_build",
            "gpu_build.has_nvidia_driver = lambda: False",
            "assert gpu_build.why_not_cuda() is None and 'torch' not in sys.modules",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.usefixtures("card")
def test_training_and_generating_begin_with_the_warning(
    finished: tuple[Path, Path],
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    build(monkeypatch, "2.13.0+cpu", None)
    said: list[str] = []
    config = config_for(tiny_base, finished[0], tmp_path / "x.safetensors", "train.steps=2")
    sdlora.train(config, say=said.append)
    with caplog.at_level(logging.WARNING, "sdlora"), sdlora.open(tiny_base) as studio:
        for _ in range(2):
            studio.generate("a fox", steps=1)
    logged = [record.getMessage() for record in caplog.records]
    for lines, expected in ((said, f"warning: {why_not_cuda()}"), (logged, why_not_cuda())):
        assert lines.count(expected) == 1
