"""A base whose UNet is kept in 8 or 4 bits: loaded, trained on, and generated with."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import sdlora
from sdlora.base.checkpoint import find_base
from sdlora.base.load import load_base
from sdlora.base.quantize import quantize_unet
from sdlora.config.sections import BaseSection
from sdlora.errors import Interrupted, ResumeError
from sdlora.lora.quantized import QUANTIZED, QuantizedLinear
from sdlora.training.session import TrainingSession
from tests.conftest import write_images
from tests.full_size import META, Watch, full_size_base
from tests.test_meta_device import new_plan, session_on
from tests.tiny import opened
from tests.training_runs import config_for, same_but_for_times, session_for

CPU = torch.device("cpu")


def quantized_modules(unet: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_of_the_transformers_are_quantised_and_nothing_else(
    tiny_base: Path, kind: str, dtype: torch.dtype
) -> None:
    whole, base = opened(tiny_base, dtype), opened(tiny_base, dtype, quantization=kind)
    layers = quantized_modules(base.unet)
    assert len(layers) == 40
    for name, module in whole.unet.named_modules():
        if isinstance(module, nn.Linear) and "transformer_blocks" in name:
            assert torch.equal(layers[name].dense(), QUANTIZED[kind](module, CPU).dense())
    kept = {name: tensor for name, tensor in whole.unet.state_dict().items() if name.rpartition(".")[0] not in layers}
    assert all(torch.equal(base.unet.state_dict()[name], tensor) for name, tensor in kept.items())
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())
    assert not any(quantized_modules(encoder.model) for encoder in base.text_encoders)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_without_memory_too(tiny_base: Path, kind: str) -> None:
    checkpoint = find_base(BaseSection(path=str(tiny_base), quantization=kind))
    here, nowhere = (load_base(checkpoint, device=device, dtype=torch.bfloat16) for device in (CPU, META))
    facts = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in base.unet.state_dict().items()}
        for base in (here, nowhere)
    ]
    assert facts[0] == facts[1]
    assert {tensor.device for tensor in nowhere.unet.state_dict().values()} == {META}


def test_a_run_learns_draws_its_samples_and_resumes_on_a_quantised_base(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "nf4"
    images = write_images(tmp_path / "images", 3)
    more = (f"base.quantization={kind}", "samples.prompts=['a red fox']", "train.steps=4", "lora.targets=attention-mlp")
    whole, halves = (tmp_path / name / "x.safetensors" for name in ("whole", "halves"))
    report = sdlora.train(config_for(tiny_base, images, whole, *more))
    assert report.samples is not None
    assert report.samples.exists()
    base = BaseSection(path=str(tiny_base), quantization=kind)
    with_lora, without, on_whole_base = (
        sdlora.generate("zorb, a red fox", base=given, loras=loras, seed=0, steps=2)[0].latents
        for given, loras in ((base, [str(whole)]), (base, []), (str(tiny_base), [str(whole)]))
    )
    assert (with_lora - without).abs().max() > 1e-3
    assert 1e-5 < (with_lora - on_whole_base).norm() < 0.1 * on_whole_base.norm()

    stop, step = threading.Event(), TrainingSession.step
    monkeypatch.setattr(TrainingSession, "step", lambda self, i: (stop.set() if i == 1 else None, step(self, i))[1])
    with pytest.raises(Interrupted):
        sdlora.train(config_for(tiny_base, images, halves, *more), stop=stop)
    with pytest.raises(ResumeError, match=f'base.quantization was "{kind}", is now "none"'):
        sdlora.train(config_for(tiny_base, images, halves, *more[1:]))
    assert sdlora.train(config_for(tiny_base, images, halves, *more)).result.resumed_from == 2
    same_but_for_times(whole, halves)


def test_the_loss_is_close_to_that_of_the_whole_base(tiny_base: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 3)
    found = {}
    for kind in ("none", *QUANTIZED):
        session = session_for(tiny_base, images, tmp_path / "x.safetensors", f"base.quantization={kind}")
        with session.attached():
            found[kind] = torch.stack([session.step(step) for step in range(5)]).mean().item()
    assert len(set(found.values())) == len(found)
    for kind in QUANTIZED:
        assert found[kind] == pytest.approx(found["none"], rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_expanded_weights(tiny_base: Path, tmp_path: Path, checkpointing: bool) -> None:
    """Also through layers without a LoRA, and where the UNet computes its activations twice."""
    images, found = write_images(tmp_path / "images", 3), []
    for expanded in (False, True):
        more = ("base.quantization=nf4", f"train.gradient_checkpointing={str(checkpointing).lower()}")
        session = session_for(tiny_base, images, tmp_path / "x.safetensors", *more)
        if expanded:
            for layer in quantized_modules(session.base.unet).values():
                weight = layer.dense()
                layer.dense = lambda weight=weight: weight
        with session.attached():
            found.append([session.step(step) for step in range(2)])
        found[-1].extend(parameter.detach() for parameter in session.adapter.parameters)
    assert all(torch.equal(ours, reference) for ours, reference in zip(*found, strict=True))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_step_on_sdxl_of_full_size_reads_nothing_back(tiny_files: dict[str, Path], tmp_path: Path, kind: str) -> None:
    plan = new_plan(tiny_files["sdxl"], tmp_path)
    base = full_size_base(tiny_files["sdxl"], torch.float16)
    quantize_unet(base.unet, kind, META)
    session = session_on(base, plan, side=1024)
    with session.attached(), Watch() as watch:
        loss = session.step(0)
    assert loss.device == META
    assert len(watch.copied) == 1
