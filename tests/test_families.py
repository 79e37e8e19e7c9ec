"""Generating, training and refusing on every family, through the same code, against diffusers' own pipelines."""

from __future__ import annotations

import itertools
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import sdlora
from sdlora.base.attention import _build_fault, use_attention, why_not_xformers
from sdlora.base.checkpoint import find_base
from sdlora.base.conditioning import Framing
from sdlora.base.load import load_base
from sdlora.config.loading import load_config
from sdlora.config.sections import BaseSection
from sdlora.errors import CompatibilityError, ResumeError, SdloraError
from sdlora.families import FAMILIES
from sdlora.formats.safetensors_file import read_header
from sdlora.generation.images import GeneratedImage
from sdlora.progress import Silence
from sdlora.training.plan import plan_config
from sdlora.training.session import open_session
from tests.conftest import write_images
from tests.tiny import tiny_ldm_tensors, tiny_pipeline

PROMPT, NEGATIVE, STEPS = "a red fox, masterpiece", "blue", 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loras(tiny_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA trained on each family's tiny base."""
    folder = tmp_path_factory.mktemp("loras")
    images = write_images(folder / "images", 4, sizes=((64, 64), (100, 60)))
    for family, file in tiny_files.items():
        config = load_config(None, overrides(file, images, folder / f"{family}.safetensors"))
        sdlora.train(config)
    return {family: folder / f"{family}.safetensors" for family in tiny_files}


def overrides(base: Path, images: Path, output: Path, *more: str) -> list[str]:
    return [
        f"base.path={base}", f"data.images={images}", "data.trigger=zorb", f"output.path={output}", "train.steps=6",
        "train.batch_size=2", "lora.rank=4", "optimizer.learning_rate=5e-2", "optimizer.text_encoder_learning_rate=5e-2",
        "samples.prompts=[]", "data.resolution=64", "optimizer.warmup_steps=0", "output.precision=float32", *more,
    ]  # fmt: skip


def ours(base: Path | BaseSection, sampler: str, *, loras: list[str] | None = None, **options: Any) -> GeneratedImage:
    settings: dict[str, Any] = {"negative": NEGATIVE, "cfg": 4.0, "seed": 7, "steps": STEPS, "size": (64, 64)}
    return sdlora.generate(
        PROMPT,
        base=base if isinstance(base, BaseSection) else str(base),
        sampler=sampler,
        loras=loras or [],
        precision="float32",
        **(settings | options),
    )[0]


def theirs(pipe: Any, **options: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"negative_prompt": NEGATIVE, "guidance_scale": 4.0, "num_inference_steps": STEPS}
    settings |= {"height": 64, "width": 64, "generator": torch.Generator().manual_seed(7), "output_type": "latent"}
    return pipe(PROMPT, **(settings | options)).images[0]


def difference(image: GeneratedImage, latents: torch.Tensor) -> float:
    return (image.latents - latents).abs().max().item()


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("form", ["file", "folder"])
def test_images_equal_those_of_diffusers(tiny_files: dict[str, Path], family: str, form: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline(family)
    base = tiny_files[family]
    if form == "folder":
        base = tmp_path / "folder"
        pipe.save_pretrained(base)
    for sampler, kind in (("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler)):
        options = {"clip_sample": False, "set_alpha_to_one": False} if sampler == "ddim" else {}
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
        assert difference(ours(base, sampler), theirs(pipe)) < 1e-4
        # SDXL takes an empty negative prompt as zeros, here as there.
        assert difference(ours(base, sampler, negative=""), theirs(pipe, negative_prompt=None)) < 1e-4
    assert difference(ours(base, "euler", negative=""), ours(base, "euler").latents) > 1e-3
    # A size that the levels of the UNet do not halve evenly.
    assert difference(ours(base, "euler", size=(72, 64)), theirs(pipe, width=72)) < 1e-4


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("terminal", [False, True])
def test_v_prediction_and_zero_terminal_snr_equal_diffusers(family: str, terminal: bool, tmp_path: Path) -> None:
    pipe = tiny_pipeline(family, prediction="v_prediction")
    tensors = (
        tiny_ldm_tensors(pipe, family) | {"v_pred": torch.zeros(0)} | ({"ztsnr": torch.zeros(0)} if terminal else {})
    )
    save_file(tensors, tmp_path / "x.safetensors")
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if terminal else {}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, **options)
    assert difference(ours(tmp_path / "x.safetensors", "euler"), theirs(pipe)) < 1e-4
    as_epsilon = BaseSection(path=str(tmp_path / "x.safetensors"), prediction="epsilon", zero_terminal_snr=False)
    assert difference(ours(as_epsilon, "euler"), theirs(pipe)) > 1e-2


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m"])
def test_a_base_that_predicts_the_image_equals_diffusers(sampler: str, tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1", prediction="sample")
    pipe.save_pretrained(tmp_path / "x")
    kinds = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++2m": DPMSolverMultistepScheduler}
    options = {"clip_sample": False, "set_alpha_to_one": False} if sampler == "ddim" else {}
    pipe.scheduler = kinds[sampler].from_config(pipe.scheduler.config, **options)
    assert difference(ours(tmp_path / "x", sampler), theirs(pipe)) < 1e-4
    as_epsilon = BaseSection(path=str(tmp_path / "x"), prediction="epsilon")
    assert difference(ours(as_epsilon, sampler), theirs(pipe)) > 1e-2
    with pytest.raises(
        SdloraError, match="euler-a' does not work on a base that predicts the image; choose one of dpm"
    ):
        ours(tmp_path / "x", "euler-a")


@pytest.mark.parametrize("sampler", ["dpm++2m", "euler-a"])
def test_every_sampler_runs_on_a_zero_terminal_base(sampler: str, tmp_path: Path) -> None:
    tensors = tiny_ldm_tensors(tiny_pipeline("sdxl"), "sdxl") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert ours(tmp_path / "x.safetensors", sampler).latents.isfinite().all()


def kohya_names(family: str) -> set[str]:
    """Names of the trained modules of the tiny models, written out by hand from kohya's rules."""
    attention = [f"{attn}_{to}" for attn in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v", "to_out_0")]
    text = [f"self_attn_{to}_proj" for to in ("q", "k", "v", "out")]
    if family == "sdxl":
        places = {"input_blocks_3_1": 2, "middle_block_1": 2, "output_blocks_0_1": 2, "output_blocks_1_1": 2}
        prefixes = ["lora_te1", "lora_te2"]
    else:
        ups = ("up_blocks_1_attentions_0", "up_blocks_1_attentions_1")
        places = dict.fromkeys(("down_blocks_0_attentions_0", "mid_block_attentions_0", *ups), 1)
        prefixes = ["lora_te"]
    unet = {
        f"lora_unet_{place}_transformer_blocks_{i}_{name}"
        for place, depth in places.items()
        for i in range(depth)
        for name in attention
    }
    encoders = {
        f"{prefix}_text_model_encoder_layers_{i}_{name}" for prefix in prefixes for i in range(3) for name in text
    }
    return unet | encoders


@pytest.mark.parametrize("family", list(FAMILIES))
def test_training_changes_every_part_under_kohya_s_names(loras: dict[str, Path], family: str) -> None:
    tensors = load_file(loras[family])
    assert {name.partition(".")[0] for name in tensors} == kohya_names(family)
    untouched = {n for n, t in tensors.items() if n.endswith("lora_up.weight") and not t.any()}
    # SDXL reads its first encoder before the last layer, which therefore learns nothing.
    expected = {n for n in kohya_names(family) if n.startswith("lora_te1") and "_layers_2_" in n}
    assert {name.partition(".")[0] for name in untouched} == expected
    metadata = read_header(loras[family], SdloraError).metadata
    assert metadata["ss_base_model_version"] == FAMILIES[family].kohya_version
    report = sdlora.inspect(loras[family])
    assert (report.family, report.format) == (family, "kohya")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_diffusers_draws_the_same_from_the_trained_file(
    tiny_files: dict[str, Path], loras: dict[str, Path], family: str
) -> None:
    pipe = tiny_pipeline(family)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    plain = theirs(pipe)
    pipe.load_lora_weights(str(loras[family].parent), weight_name=loras[family].name)
    reference = theirs(pipe)
    image = ours(tiny_files[family], "euler", loras=[str(loras[family])])
    assert difference(image, reference) < 1e-3
    assert (plain - reference).abs().max() > 1e-2


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loss_is_the_formula_on_diffusers_models(tiny_files: dict[str, Path], family: str, tmp_path: Path) -> None:
    """One step's loss, rebuilt from the pipeline's own parts: latents, noise, text, sizes, target and weight."""
    images = write_images(tmp_path / "images", 1, sizes=((100, 60),))
    more = (
        "train.batch_size=1",
        "objective.min_snr_gamma=0",
        "data.resolution=64",
        "optimizer.text_encoder_learning_rate=0",
    )
    plan = plan_config(load_config(None, overrides(tiny_files[family], images, tmp_path / "x.safetensors", *more)))
    base = load_base(plan.base, device=CPU, dtype=torch.float32)
    session = open_session(plan, base, Accelerator(), Silence())
    (placement,), (item,) = plan.placements, plan.items
    assert (placement.width, placement.height) == (80, 48)
    (cached,) = session.images.values()
    framing = cached.framing
    assert framing.numbers == (60, 100, placement.top, placement.left, 48, 80)

    pipe, call = tiny_pipeline(family), {}
    forward = base.unet.forward

    def spy(*given: Any, **named: Any) -> Any:
        call["given"], call["named"] = given, named
        return forward(*given, **named)

    base.unet.forward = spy
    with session.attached():
        loss = session.step(0)
    noisy, times, context = call["given"]
    reference = pipe.encode_prompt(
        prompt=f"zorb, {item.source.captions[0]}",
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    torch.testing.assert_close(context, reference[0], rtol=1e-5, atol=1e-5)
    added = call["named"]["added_cond_kwargs"]
    if family == "sdxl":
        torch.testing.assert_close(added["text_embeds"], reference[2], rtol=1e-5, atol=1e-5)
        assert added["time_ids"].tolist() == [list(map(float, framing.numbers))]
    else:
        assert added is None
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    share = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    from sdlora.training.batches import draw

    drawn = draw(seed=0, step=0, slot=0, slots=1, shape=tuple(noisy.shape[1:]), timesteps=1000, caption_dropout=0.0)
    noise = torch.from_numpy(drawn.noise)[None]
    latents = (noisy - (1 - share).sqrt() * noise) / share.sqrt()
    torch.testing.assert_close(
        latents[0], cached.mean + cached.std * torch.from_numpy(drawn.posterior), rtol=1e-3, atol=1e-3
    )
    with torch.no_grad():
        predicted = pipe.unet(noisy, times, reference[0], added_cond_kwargs=added)[0]
    torch.testing.assert_close(loss, (predicted - noise).square().mean(), rtol=1e-4, atol=1e-5)


def test_v_prediction_trains_towards_v(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 2)
    for more in (("base.prediction=v_prediction",), ("base.prediction=v_prediction", "base.zero_terminal_snr=true")):
        config = load_config(None, overrides(tiny_files["sd2"], images, tmp_path / f"{len(more)}.safetensors", *more))
        sdlora.train(config)
        metadata = read_header(Path(config.output.path), SdloraError).metadata
        assert metadata["ss_base_model_version"] == "sd_v2_v"
        assert metadata["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
        assert metadata["modelspec.prediction_type"] == "v"
        assert metadata["ss_zero_terminal_snr"] == str(len(more) == 2)


def test_replacements_are_part_of_a_run_and_their_paths_are_not(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    images, output = write_images(tmp_path / "images", 2), tmp_path / "x.safetensors"
    tiny_pipeline("sd1", seed=5).vae.save_pretrained(tmp_path / "vae")
    options = overrides(tiny_files["sd1"], images, output)
    sdlora.train(load_config(None, [*options, f"base.vae={tmp_path / 'vae'}"]))
    assert str(tmp_path) not in str(read_header(output, SdloraError).metadata)
    with pytest.raises(ResumeError, match="the base checkpoint has changed"):
        sdlora.train(load_config(None, options))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradient_checkpointing_changes_memory_and_nothing_else(
    tiny_files: dict[str, Path], family: str, loras: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "x.safetensors"
    images = loras[family].parent / "images"
    config = load_config(None, overrides(tiny_files[family], images, output, "train.gradient_checkpointing=true"))
    sdlora.train(config)
    one, other = load_file(loras[family]), load_file(output)
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4) for name in one)


def test_long_captions_are_trained_in_chunks(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 2)
    (images / "0.txt").write_text(", ".join(f"thing {i}" for i in range(25)))
    config = load_config(None, overrides(tiny_files["sdxl"], images, tmp_path / "x.safetensors"))
    plan = plan_config(config)
    session = open_session(plan, load_base(plan.base, device=CPU, dtype=torch.float32), Accelerator(), Silence())
    assert session.embeddings.encode(["zorb", "a cat", ""]).context.shape == (3, 154, 128)
    sdlora.train(config)
    assert read_header(tmp_path / "x.safetensors", SdloraError).metadata["ss_max_token_length"] == "150"
    short = load_config(
        None, overrides(tiny_files["sdxl"], images, tmp_path / "y.safetensors", "data.max_token_length=75")
    )
    sdlora.train(short)
    assert read_header(tmp_path / "y.safetensors", SdloraError).metadata["ss_max_token_length"] == "None"


@pytest.mark.parametrize(("lora", "base"), list(itertools.permutations(FAMILIES, 2)))
def test_wrong_pairs_are_refused_before_anything_is_loaded(
    tiny_files: dict[str, Path], loras: dict[str, Path], lora: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("sdlora.base.load.load_base", refuse)
    with pytest.raises(CompatibilityError) as caught:
        ours(tiny_files[base], "euler", loras=[str(loras[lora])])
    (sentence,) = caught.value.problems
    assert f"a LoRA for {FAMILIES[lora].title}; the base {base} is {FAMILIES[base].title}" in sentence
    assert f"use it with a {FAMILIES[lora].title} base" in sentence


def test_metadata_that_lies_does_not_decide(
    tiny_files: dict[str, Path], loras: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(load_file(loras["sdxl"]), tmp_path / "x.safetensors", metadata={"ss_base_model_version": "sd_v1"})
    assert sdlora.inspect(tmp_path / "x.safetensors").family == "sdxl"
    with caplog.at_level(logging.WARNING):
        ours(tiny_files["sdxl"], "euler", loras=[str(tmp_path / "x.safetensors")])
    with pytest.raises(CompatibilityError, match="a LoRA for Stable Diffusion XL; the base sd1"):
        ours(tiny_files["sd1"], "euler", loras=[str(tmp_path / "x.safetensors")])


def test_framings_are_heights_first() -> None:
    framing = Framing(original_width=1, original_height=2, left=3, top=4, width=5, height=6)
    assert framing.numbers == (2, 1, 4, 3, 6, 5)


def test_kernels_for_another_cuda_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the words of xformers 0.0.35 beside another torch."""
    words = (
        "xFormers can't load C++/CUDA extensions. xFormers was built for:\n    PyTorch 2.10.0+cu128 with CUDA 1208 (you"
    )
    module = types.ModuleType("xformers._cpp_lib")
    monkeypatch.setattr(module, "_cpp_library_load_exception", RuntimeError(words), raising=False)
    parent = types.ModuleType("xformers")
    monkeypatch.setattr(parent, "_cpp_lib", module, raising=False)
    monkeypatch.setitem(sys.modules, "xformers", parent)
    reason = _build_fault()
    assert reason is not None
    assert "they were built for PyTorch 2.10.0+cu128 with CUDA 1208, and this is PyTorch" in reason
    monkeypatch.setattr(module, "_cpp_library_load_exception", None)
    assert _build_fault() is None


def test_xformers_is_probed_and_replaced_where_it_cannot_run(
    tiny_files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU; whether xformers runs on it depends on its build")
    reason = why_not_xformers(CPU, torch.float32)
    assert reason is not None
    assert "not installed" in reason or "needs a CUDA device" in reason
    base = load_base(find_base(str(tiny_files["sd1"])), device=CPU, dtype=torch.float32)
    before = {name: type(processor) for name, processor in base.unet.attn_processors.items()}
    for requested, warnings in (("auto", 0), ("sdpa", 0), ("xformers", 1)):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            use_attention(base.unet, requested)
        assert len(caplog.records) == warnings
    assert "using torch's own attention" in caplog.text
    assert {name: type(processor) for name, processor in base.unet.attn_processors.items()} == before
