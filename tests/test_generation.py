"""Images against diffusers' own pipeline, with and without LoRAs; recipes and grids."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sdlora
from sdlora.errors import BaseModelError, CompatibilityError, LoraFileError, SdloraError
from sdlora.formats.lora_writer import write_lora
from sdlora.generation.grid import labelled_grid
from sdlora.generation.images import GeneratedImage
from sdlora.generation.loras import LoraChoice
from sdlora.generation.samplers import SAMPLERS
from sdlora.lora.low_rank import LowRank
from tests.tiny import write_tiny_base

STEPS = 4


def random_lora(base: Path, file: Path, *, seed: int, drop: str = "", alpha: float = 2.0) -> Path:
    """A LoRA with a strong effect on every attention projection of ``base``."""
    from sdlora.base.checkpoint import find_base
    from sdlora.base.load import load_base
    from sdlora.lora.targets import choose_targets

    loaded = load_base(find_base(str(base)), device=torch.device("cpu"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: LowRank(
            down=torch.randn(4, module.in_features, generator=generator) / 4,
            up=torch.randn(module.out_features, 4, generator=generator) / 4,
            alpha=alpha,
        )
        for name, module in choose_targets(loaded.modules(), "attention").items()
        if not drop or drop not in name
    }
    write_lora(file, modules, {}, dtype=torch.float32)
    return file


@pytest.fixture(scope="module")
def loras(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("loras")
    first = random_lora(tiny_base, folder / "one.safetensors", seed=1)
    return first, random_lora(tiny_base, folder / "two.safetensors", seed=2, alpha=4.0)


def ours(base: Path, choices: list[str], **options: object) -> GeneratedImage:
    settings = {"seed": 7, "steps": STEPS, "cfg": 4.0, "negative": "blue", "precision": "float32"} | options
    return sdlora.generate("a red fox", base=str(base), loras=choices, **settings)[0]  # ty: ignore[invalid-argument-type]


def theirs(base: Path, loaded: dict[str, tuple[Path, float]]) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for name, (file, _) in loaded.items():
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    if loaded:
        pipe.set_adapters(list(loaded), [weight for _, weight in loaded.values()])
    generator = torch.Generator("cpu").manual_seed(7)
    return pipe(
        "a red fox", negative_prompt="blue", num_inference_steps=STEPS, guidance_scale=4.0, generator=generator,
        output_type="latent",
    ).images[0]  # fmt: skip


def test_without_lora_equals_the_diffusers_pipeline(tiny_base: Path) -> None:
    assert (ours(tiny_base, []).latents - theirs(tiny_base, {})).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_one_lora_equals_diffusers_loading_the_same_file(tiny_base: Path, loras: tuple[Path, Path]) -> None:
    reference = theirs(tiny_base, {"one": (loras[0], 1.0)})
    image = ours(tiny_base, [f"{loras[0]}:1.0"])
    assert (image.latents - reference).abs().max() < 1e-3
    assert (ours(tiny_base, []).latents - reference).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
def test_stacked_loras_equal_diffusers(tiny_base: Path, loras: tuple[Path, Path]) -> None:
    reference = theirs(tiny_base, {"one": (loras[0], 0.7), "two": (loras[1], 0.5)})
    image = ours(tiny_base, [f"{loras[0]}:0.7", f"{loras[1]}:0.5"])
    assert (image.latents - reference).abs().max() < 1e-3


def test_text_encoder_and_unet_weights_are_separate(tiny_base: Path, loras: tuple[Path, Path]) -> None:
    file = str(loras[0])
    both, neither = ours(tiny_base, [f"{file}:1:1"]), ours(tiny_base, [f"{file}:0:0"])
    unet, text = ours(tiny_base, [f"{file}:1:0"]), ours(tiny_base, [f"{file}:0:1"])
    assert torch.equal(both.latents, ours(tiny_base, [file]).latents)
    assert torch.equal(neither.latents, ours(tiny_base, []).latents)
    latents = [unet.latents, text.latents, both.latents, neither.latents]
    for first, second in itertools.combinations(latents, 2):
        assert (first - second).abs().max() > 1e-3


def test_a_partial_lora_is_applied_and_counted(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = random_lora(tiny_base, tmp_path / "part.safetensors", seed=3)
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    tensors |= {
        key.replace("lora_te_", "lora_te_more_"): t.clone() for key, t in tensors.items() if key.startswith("lora_te_")
    }
    save_file(tensors, file)
    with caplog.at_level(logging.WARNING, "sdlora"):
        ours(tiny_base, [str(file)])
    assert "40 of 48 modules matched" in caplog.text
    assert "missing: text encoder" in caplog.text


def test_a_lora_for_another_base_is_refused_in_one_sentence(tiny_base: Path, tmp_path: Path) -> None:
    wide = write_tiny_base(tmp_path / "wide", width=48)
    file = random_lora(wide, tmp_path / "wide.safetensors", seed=1)
    with pytest.raises(CompatibilityError, match="modules do not fit the base tiny") as caught:
        ours(tiny_base, [str(file)])
    assert len(caught.value.problems) == 1
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    xl = LowRank(down=torch.randn(2, 2048), up=torch.randn(640, 2), alpha=1.0)
    write_lora(tmp_path / "xl.safetensors", {name: xl}, {}, dtype=torch.float16)
    with pytest.raises(
        CompatibilityError, match=r"LoRA for Stable Diffusion XL; the base tiny is Stable Diffusion 1\.x"
    ):
        ours(tiny_base, [str(tmp_path / "xl.safetensors")])


def test_every_lora_that_fails_is_named(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(LoraFileError) as caught:
        ours(tiny_base, [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")])
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (100, 64)}, "multiples of 8 pixels"),
        ({"sampler": "magic"}, "dpm\\+\\+2m"),
        ({"steps": 0}, "at least 1"),
        ({"seed": 2**32 - 1, "count": 2}, "seed 4294967296: the highest is 4294967295; begin with a lower one"),
    ],
)
def test_requests_that_cannot_be_met(tiny_base: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(SdloraError, match=message):
        ours(tiny_base, [], **options)


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler/scheduler_config.json", "text_encoder/model.safetensors"])
def test_incomplete_and_damaged_checkpoints(tiny_base: Path, tmp_path: Path, part: str) -> None:
    from tests.tiny import copy_base

    base = copy_base(tiny_base, tmp_path / "broken")
    target = base / part
    if target.is_dir():
        target.rename(tmp_path / "elsewhere")
    else:
        target.write_bytes(target.read_bytes()[:100])
    with pytest.raises(BaseModelError, match=f"(?i){part.split('/')[0]}"):
        ours(base, [])


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_draws_and_repeats(tiny_base: Path, sampler: str) -> None:
    first, second = (ours(tiny_base, [], sampler=sampler) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert first.latents.isfinite().all()
    assert f"Sampler: {SAMPLERS[sampler].a1111_name}," in first.parameters


def test_samplers_are_called_what_a1111_calls_them() -> None:
    names = {name: sampler.a1111_name for name, sampler in SAMPLERS.items()}
    assert names == {
        "dpm++2m": "DPM++ 2M", "dpm++2m-sde": "DPM++ 2M SDE", "dpm++3m-sde": "DPM++ 3M SDE", "euler": "Euler",
        "euler-a": "Euler a", "heun": "Heun", "dpm2": "DPM2", "dpm2-a": "DPM2 a", "lms": "LMS", "dpm++sde": "DPM++ SDE",
        "dpm++2s-a": "DPM++ 2S a", "unipc": "UniPC", "ddim": "DDIM", "lcm": "LCM", "tcd": "TCD",
    }  # fmt: skip


def test_the_table_of_samplers_is_read_without_third_party_packages() -> None:
    code = "import sys, sdlora.generation.request; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "sdlora" in loaded
    assert sorted(loaded & {"torch", "diffusers", "transformers", "numpy", "PIL", "pydantic"}) == []


def test_guidance_of_one_ignores_the_negative_prompt(tiny_base: Path) -> None:
    one, other = (ours(tiny_base, [], cfg=1.0, negative=text) for text in ("blue", "green"))
    assert torch.equal(one.latents, other.latents)


def test_sizes_and_seeds(tiny_base: Path) -> None:
    wide = sdlora.generate(["x", "y"], base=str(tiny_base), size=(96, 64), count=2, steps=2, seed=0)
    assert [p.image.size for p in wide] == [(96, 64)] * 4
    assert [p.request.seed for p in wide] == [0, 1, 0, 1]
    assert not torch.equal(wide[0].latents, wide[1].latents)


def test_parameters_are_as_a1111_writes_them(tiny_base: Path, loras: tuple[Path, Path]) -> None:
    image = ours(tiny_base, [f"{loras[0]}:0.7", f"{loras[1]}:0.5:0.25"])
    digests = [sdlora.inspect(file).metadata["sshs_model_hash"][:12] for file in loras]
    assert image.parameters == (
        "a red fox <lora:one:0.7> <lora:two:te=0.25:unet=0.5>\nNegative prompt: blue\n"
        f"Steps: 4, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 4, Seed: 7, Size: 64x64, "
        f"Model: tiny, RNG: CPU, "
        f'Lora hashes: "one: {digests[0]}, two: {digests[1]}", '
        f'Hashes: {{"lora:one": "{digests[0]}", "lora:two": "{digests[1]}"}}, Version: sdlora {sdlora.__version__}'
    )


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_lora_choices_are_read_as_written(unet: float, text: float) -> None:
    choice = LoraChoice.parse(f"C:\\my loras\\x.safetensors:{unet!r}:{text!r}")
    assert (choice.unet, choice.text_encoder, choice.name.endswith("x")) == (unet, text, True)


def test_one_weight_holds_for_both_parts() -> None:
    assert LoraChoice.parse("x.safetensors:0.4") == LoraChoice(file=Path("x.safetensors"), unet=0.4, text_encoder=0.4)
    assert LoraChoice.parse("x.safetensors").unet == 1.0
    for text in ("x.safetensors:", "x.safetensors:much", "x.txt", "x.safetensors:nan", "x.safetensors:99"):
        with pytest.raises(LoraFileError, match="x"):
            LoraChoice.parse(text)


def test_grid_places_images_under_their_labels() -> None:
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    sheet = labelled_grid([[red, blue], [blue, red]], columns=["one", "two"], row_labels=["a", "b"], scale=2)
    top = sheet.height - 2 * (64 + 6) + 6
    left = sheet.width - 2 * (64 + 6) + 6
    assert sheet.getpixel((left + 5, top + 5)) == (255, 0, 0)
    assert sheet.getpixel((left + 75, top + 5)) == (0, 0, 255)
    assert sheet.getpixel((left + 75, top + 75)) == (255, 0, 0)
    assert len(sheet.crop((left, 0, left + 64, top - 6)).getcolors() or ()) > 1
