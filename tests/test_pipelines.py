"""LoRAs on pipelines of diffusers: their images against diffusers' own loading, and no trace afterwards."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

import sdlora
from sdlora.errors import SdloraError
from sdlora.formats.lora_writer import write_lora
from sdlora.lora.low_rank import LowRank
from sdlora.pipelines.applying import _state
from tests.tiny import tiny_pipeline

TARGETS = (".to_q", ".to_v", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
FAMILIES = ("sd1", "sd2", "sdxl")


def lora_for(pipe: Any, file: Path, *, seed: int = 1) -> Path:
    """A LoRA of rank 4 on the attention of the UNet and of the text encoders."""
    made = torch.Generator().manual_seed(seed)
    changes = {
        name: LowRank(
            down=torch.randn(4, module.in_features, generator=made) / 4,
            up=torch.randn(module.out_features, 4, generator=made) / 4,
            alpha=4.0,
        )
        for name, module in _state(pipe).base.modules.items()
        if name.endswith(TARGETS)
    }
    base = _state(pipe).base
    write_lora(file, changes, {}, dtype=torch.float32, family=base.family, base_modules=base.module_shapes())
    return file


def drawn(pipe: Any, **more: Any) -> torch.Tensor:
    options = {"num_inference_steps": 2, "output_type": "latent", "generator": torch.Generator().manual_seed(3)} | more
    if "image" not in options:
        options |= {"height": 64, "width": 64}
    pipe.set_progress_bar_config(disable=True)
    return pipe("a fox", **options).images


def bits(pipe: Any) -> dict[str, torch.Tensor]:
    models = [(part, getattr(pipe, part, None)) for part in ("unet", "text_encoder", "text_encoder_2")]
    named = [(part, model.state_dict()) for part, model in models if model is not None]
    return {f"{part}.{name}": tensor.clone() for part, state in named for name, tensor in state.items()}


def same(pipe: Any, values: dict[str, torch.Tensor]) -> bool:
    now = bits(pipe)
    return now.keys() == values.keys() and all(torch.equal(now[name], value) for name, value in values.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_those_of_the_formula_and_no_trace_remains(family: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(family)
    files = [lora_for(pipe, tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2)]
    before, pristine = drawn(pipe), bits(pipe)
    with sdlora.applied(pipe, [f"{files[0]}:0.8", f"{files[1]}:-0.5:0.25"]):
        inside, merged = drawn(pipe), bits(pipe)
        for name, (change, weight) in _state(pipe).loras[1].changes().items():
            (first, strength) = _state(pipe).loras[0].changes()[name]
            key = name if name in pristine or f"{name}.weight" in pristine else name.replace(".text_model", "", 1)
            exact = pristine[f"{key}.weight"].double()
            for one, w in ((change, weight), (first, strength)):
                exact = exact + w * one.alpha / one.rank * one.up.double() @ one.down.double()  # ty: ignore
            torch.testing.assert_close(merged[f"{key}.weight"].double(), exact, rtol=1e-6, atol=1e-6)
    assert (inside - before).abs().max() > 1e-3
    assert same(pipe, pristine)
    assert torch.equal(drawn(pipe), before)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_image_is_that_of_diffusers_loading_the_same_file(family: str, tmp_path: Path) -> None:
    ours, theirs = tiny_pipeline(family), tiny_pipeline(family)
    file = lora_for(ours, tmp_path / "x.safetensors")
    unet = {f"unet.{k}": v for k, v in peft_names(ours, "unet.").items()}
    theirs.load_lora_weights(unet)
    sdlora.apply(ours, f"{file}:1:0")
    torch.testing.assert_close(drawn(ours), drawn(theirs), rtol=1e-3, atol=1e-4)
    with pytest.raises(SdloraError, match=r"holds LoRAs that diffusers loaded; call pipe\.unload_lora_weights"):
        sdlora.apply(theirs, file)


def peft_names(pipe: Any, part: str) -> dict[str, torch.Tensor]:
    """The LoRA of ``lora_for`` in diffusers' names."""
    made = torch.Generator().manual_seed(1)
    tensors = {}
    for name, module in _state(pipe).base.modules.items():
        if name.endswith(TARGETS):
            down = torch.randn(4, module.in_features, generator=made) / 4  # ty: ignore
            up = torch.randn(module.out_features, 4, generator=made) / 4  # ty: ignore
            if name.startswith(part):
                tensors |= {
                    f"{name.removeprefix(part)}.lora_A.weight": down,
                    f"{name.removeprefix(part)}.lora_B.weight": up,
                }
    return tensors


def test_pipelines_that_share_a_unet_share_its_loras(tmp_path: Path) -> None:
    for family, kind in (("sd1", StableDiffusionImg2ImgPipeline), ("sdxl", StableDiffusionXLImg2ImgPipeline)):
        pipe = tiny_pipeline(family)
        other: Any = kind(**pipe.components)
        file = lora_for(pipe, tmp_path / f"{family}.safetensors")
        image = Image.new("RGB", (64, 64), "red")
        before = drawn(other, image=image, strength=1.0)
        sdlora.apply(pipe, file)
        assert not torch.allclose(drawn(other, image=image, strength=1.0), before)
        sdlora.restore(other)
        assert torch.equal(drawn(other, image=image, strength=1.0), before)


def test_a_controlnet_pipeline(tmp_path: Path) -> None:
    base = tiny_pipeline("sd1")
    net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 16, 32, 32))
    pipe: Any = StableDiffusionControlNetPipeline(**base.components, controlnet=net)
    options = {"image": Image.new("RGB", (64, 64), "red")}
    file = lora_for(pipe, tmp_path / "x.safetensors")
    before = drawn(pipe, **options)
    with sdlora.applied(pipe, file):
        assert not torch.allclose(drawn(pipe, **options), before)
    assert torch.equal(drawn(pipe, **options), before)


def test_blocks_nest_and_faults_leave_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1")
    files = [lora_for(pipe, tmp_path / f"{n}.safetensors", seed=n) for n in (1, 2)]
    wrong = lora_for(tiny_pipeline("sdxl"), tmp_path / "wrong.safetensors")
    pristine = bits(pipe)
    with sdlora.applied(pipe, files[0]):
        outer = bits(pipe)
        with sdlora.applied(pipe, files[1]):
            assert not same(pipe, outer)
        assert same(pipe, outer)
        for faulty, said in (
            (wrong, "is SD 1.x|is Stable Diffusion 1"),
            (f"{files[1]}:abc", "not a number"),
            (tmp_path / "none.safetensors", "no such file"),
            ([files[1], files[1]], "named more than once"),
            (f"{files[1]}:1:stop=3", "a start, a stop or a curve needs the steps"),
        ):
            with pytest.raises(SdloraError, match=said) as caught:
                sdlora.apply(pipe, [files[0], faulty] if isinstance(faulty, Path) else faulty)
            assert len(caught.value.problems) == 1
            assert same(pipe, outer)
    assert same(pipe, pristine)
    with pytest.raises(SdloraError, match="pipe is a str; expected a pipeline of diffusers"):
        sdlora.apply("mini", files[0])


def test_what_is_kept_goes_with_the_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1")
    sdlora.apply(pipe, lora_for(pipe, tmp_path / "x.safetensors"))
    unet = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert unet() is None
