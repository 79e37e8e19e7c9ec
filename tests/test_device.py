"""Which precision is chosen on which device, by faked descriptions of them, and the line that says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sdlora as package
from sdlora.base.device import DeviceFacts, device_facts
from sdlora.base.precision import SMALL_UNET, choose_precision, describe_precision, explain_precision
from sdlora.errors import SdloraError
from tests.conftest import run_sdlora
from tests.training_runs import config_for

T4 = DeviceFacts(kind="cuda", name="Tesla T4", bfloat16=False, free=15_400_000_000)
RTX_4090 = DeviceFacts(kind="cuda", name="NVIDIA GeForce RTX 4090", bfloat16=True, free=24_000_000_000)
MAC = DeviceFacts(kind="mps", name="Apple GPU", bfloat16=False, free=10_000_000_000)
CPU = DeviceFacts(kind="cpu", name="CPU with 2 threads", bfloat16=False, free=None)
CPU_WITH_AMX = DeviceFacts(kind="cpu", name="CPU with 2 threads", bfloat16=True, free=8_000_000_000)
OTHER = DeviceFacts(kind="xpu", name="xpu", bfloat16=True, free=None)
LARGE = SMALL_UNET * 8
LINE = r"device: CPU with \d+ threads \(cpu\), precision: float32 \(.+\), free memory: \d+\.\d GB"


@pytest.mark.parametrize(
    ("facts", "unet", "training", "generating"),
    [
        (T4, LARGE, torch.float16, torch.float16),
        (RTX_4090, LARGE, torch.bfloat16, torch.float16),
        (RTX_4090, 1, torch.bfloat16, torch.float16),
        (MAC, LARGE, torch.float16, torch.float16),
        (CPU, LARGE, torch.float32, torch.float32),
        (CPU_WITH_AMX, LARGE, torch.bfloat16, torch.bfloat16),
        (CPU_WITH_AMX, SMALL_UNET - 1, torch.float32, torch.float32),
        (OTHER, LARGE, torch.float32, torch.float32),
    ],
    ids=lambda value: value.name if isinstance(value, DeviceFacts) else None,
)
def test_the_automatic_precision(facts: DeviceFacts, unet: int, training: torch.dtype, generating: torch.dtype) -> None:
    assert explain_precision("auto", facts, unet_parameters=unet).dtype == training
    assert explain_precision("auto", facts, unet_parameters=unet, generating=True).dtype == generating
    for name in ("float32", "bfloat16", "float16"):
        assert explain_precision(name, facts, unet_parameters=unet).dtype == getattr(torch, name)
    with pytest.raises(SdloraError, match="precision 'fp8' is unknown; choose one of auto, float32"):
        explain_precision("fp8", facts, unet_parameters=unet)


def test_the_line_names_device_precision_reason_and_free_memory() -> None:
    assert describe_precision(T4, explain_precision("auto", T4, unet_parameters=LARGE)) == (
        "device: Tesla T4 (cuda), precision: float16 (the GPU has no bfloat16 in hardware), free memory: 15.4 GB"
    )
    assert describe_precision(CPU, explain_precision("bfloat16", CPU, unet_parameters=LARGE)) == (
        "device: CPU with 2 threads (cpu), precision: bfloat16 (as set), free memory: unknown"
    )


def test_a_cuda_device_is_asked_for_its_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", {device: "Tesla T4"}.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {device: (15_400_000_000, 15_800_000_000)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert device_facts(device) == T4
    assert choose_precision("auto", device, unet_parameters=1) == torch.float16


def test_the_cpu_says_how_much_memory_is_free() -> None:
    facts = device_facts(torch.device("cpu"))
    assert facts.kind == "cpu"
    assert facts.free
    assert facts.free > 1_000_000


def test_a_training_says_where_before_the_base_is_loaded(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlora.training import loop

    said: list[str] = []
    load = loop.load_base

    def loading(*arguments: object, **more: object) -> object:
        assert re.fullmatch(LINE, said[-1])
        return load(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "load_base", loading)
    config = config_for(tiny_base, images, tmp_path / "x.safetensors", "train.steps=1")
    package.train(config, say=said.append)
    assert sum(line.startswith("device: ") for line in said) == 1
    said.clear()
    package.train(config, say=said.append)
    assert not any(line.startswith("device: ") for line in said)


def test_generating_says_where_on_standard_error(tiny_base: Path, tmp_path: Path) -> None:
    words = ("generate", "a fox", "--base", tiny_base, "--steps", "1", "--seed", "1", "--json", "--out", tmp_path / "o")
    result = run_sdlora(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.match(LINE, result.stderr.splitlines()[0])
    assert "device:" not in result.stdout


def test_an_open_studio_says_it_once(tiny_base: Path) -> None:
    said: list[str] = []
    with package.open(str(tiny_base)) as studio:
        for _ in range(2):
            studio.generate("a fox", steps=1, seed=1, say=said.append)
    assert len(said) == 1
    assert re.fullmatch(LINE, said[0])
