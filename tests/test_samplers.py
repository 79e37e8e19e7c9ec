"""Each sampler against diffusers' pipeline with the same noise, or against k-diffusion's formulas written down here."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from diffusers.schedulers import AysSchedules
from PIL import Image
from torch import Tensor

import sdlora
from sdlora.base.schedule import ScheduleFacts
from sdlora.config.sections import BaseSection
from sdlora.errors import SdloraError
from sdlora.generation.samplers import SAMPLERS, read_sampler
from sdlora.generation.schedulers import make_scheduler
from sdlora.generation.schedules import SCHEDULES
from sdlora.progress import Silence
from tests.tiny import tiny_pipeline

STEPS = 6
SDE = {"algorithm_type": "sde-dpmsolver++"}
KARRAS, EXPONENTIAL = {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}
DDIM = {"clip_sample": False, "set_alpha_to_one": False}
TRAILING, LEADING = {"timestep_spacing": "trailing"}, {"timestep_spacing": "leading"}
PIPELINES: list[tuple[str, str | None, str, dict[str, Any]]] = [
    ("dpm++2m", None, "DPMSolverMultistepScheduler", {}),
    ("dpm++2m", "karras", "DPMSolverMultistepScheduler", KARRAS),
    ("dpm++2m", "exponential", "DPMSolverMultistepScheduler", EXPONENTIAL),
    ("dpm++2m", "trailing", "DPMSolverMultistepScheduler", TRAILING),
    ("dpm++2m-sde", None, "DPMSolverMultistepScheduler", SDE),
    ("dpm++2m-sde", "karras", "DPMSolverMultistepScheduler", SDE | KARRAS),
    ("dpm++3m-sde", "exponential", "DPMSolverMultistepScheduler", SDE | EXPONENTIAL | {"solver_order": 3}),
    ("euler", None, "EulerDiscreteScheduler", {}),
    ("euler", "karras", "EulerDiscreteScheduler", KARRAS),
    ("euler", "leading", "EulerDiscreteScheduler", LEADING),
    ("euler-a", None, "EulerAncestralDiscreteScheduler", {}),
    ("euler-a", "trailing", "EulerAncestralDiscreteScheduler", TRAILING),
    ("heun", None, "HeunDiscreteScheduler", {}),
    ("heun", "karras", "HeunDiscreteScheduler", KARRAS),
    ("dpm2", None, "KDPM2DiscreteScheduler", {}),
    ("dpm2", "karras", "KDPM2DiscreteScheduler", KARRAS),
    ("dpm2-a", None, "KDPM2AncestralDiscreteScheduler", {}),
    ("dpm2-a", "exponential", "KDPM2AncestralDiscreteScheduler", EXPONENTIAL),
    ("unipc", None, "UniPCMultistepScheduler", {}),
    ("unipc", "karras", "UniPCMultistepScheduler", KARRAS),
    ("ddim", None, "DDIMScheduler", DDIM),
    ("ddim", "trailing", "DDIMScheduler", DDIM | TRAILING),
    ("lcm", None, "LCMScheduler", {"set_alpha_to_one": False}),
    ("tcd", None, "TCDScheduler", {"set_alpha_to_one": False}),
]


def ours(base: Path, sampler: str, schedule: str | None = None, **options: Any) -> Tensor:
    settings = {"seed": 7, "steps": STEPS, "cfg": 4.0, "negative": "blue", "precision": "float32"} | options
    prompt = settings.pop("prompt", "a red fox")
    return sdlora.generate(prompt, base=str(base), sampler=sampler, schedule=schedule, **settings)[0].latents


@pytest.fixture(scope="module")
def pipe(tiny_base: Path) -> StableDiffusionPipeline:
    made = StableDiffusionPipeline.from_pretrained(tiny_base, torch_dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def scheduler_of(name: str, options: dict[str, Any]) -> Any:
    facts = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return getattr(diffusers, name)(**facts, **options)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers' own DPM2, here
@pytest.mark.parametrize(("sampler", "schedule", "name", "options"), PIPELINES)
def test_a_sampler_equals_the_diffusers_pipeline(
    pipe: StableDiffusionPipeline,
    tiny_base: Path,
    sampler: str,
    schedule: str | None,
    name: str,
    options: dict[str, Any],
) -> None:
    pipe.scheduler = scheduler_of(name, options)
    theirs = pipe(
        "a red fox", negative_prompt="blue", num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(7), eta=0.3 if sampler == "tcd" else 0.0,
    ).images[0]  # fmt: skip
    assert theirs.std() > 0.1
    assert (ours(tiny_base, sampler, schedule) - theirs).abs().max() < 1e-4


def run(scheduler: Any, model: Callable[[Tensor, float], Tensor], noise: Tensor, generator: torch.Generator) -> Tensor:
    """Sampling with ``model(x, σ)``, which gives the image without noise, as ``denoise`` does."""
    x = noise * scheduler.init_noise_sigma
    for number, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[number])
        torch.testing.assert_close(scheduler.scale_model_input(x, timestep), x / (sigma**2 + 1) ** 0.5)
        epsilon = (x - model(x, sigma)) / sigma
        x = scheduler.step(epsilon, timestep, x, generator=[generator], return_dict=False)[0]
    return x


def model(x: Tensor, sigma: float) -> Tensor:
    """An image without noise that depends on all of x and σ, not linearly."""
    return torch.tanh(x.roll(1, 2) / (1 + sigma)) * 2 - x.mean() / (3 + sigma)


def started(schedule: str | None, sampler: str, steps: int = 8) -> tuple[Any, Tensor, Tensor]:
    scheduler = make_scheduler(SAMPLERS[sampler], ScheduleFacts(), steps, schedule)
    noise = torch.randn((1, 4, 6, 6), generator=torch.Generator().manual_seed(1))
    levels = make_scheduler(SAMPLERS["euler"], ScheduleFacts(), steps, schedule).sigmas.double()
    return scheduler, noise, levels


@pytest.mark.parametrize("schedule", [None, "karras", "sgm-uniform"])
def test_dpm_sde_is_that_of_k_diffusion(schedule: str | None) -> None:
    scheduler, noise, sigmas = started(schedule, "dpm++sde")
    found = run(scheduler, model, noise, torch.Generator().manual_seed(3))
    # sample_dpmpp_sde with r = 1/2, on a Brownian path whose parts are drawn in order.
    generator, x = torch.Generator().manual_seed(3), noise.double() * sigmas[0]
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        denoised = model(x, now)
        if after == 0:
            x = denoised
            break
        middle = float(np.exp((np.log(now) + np.log(after)) / 2))
        w1 = torch.randn(noise.shape, generator=generator).double() * (now - middle) ** 0.5
        su = (middle**2 * (now**2 - middle**2) / now**2) ** 0.5
        sd = (middle**2 - su**2) ** 0.5
        x2 = sd / now * x - (sd / now - 1) * denoised + w1 / (now - middle) ** 0.5 * su
        denoised2 = model(x2, middle)
        w2 = torch.randn(noise.shape, generator=generator).double() * (middle - after) ** 0.5
        su = (after**2 * (now**2 - after**2) / now**2) ** 0.5
        sd = (after**2 - su**2) ** 0.5
        x = sd / now * x - (sd / now - 1) * denoised2 + (w1 + w2) / (now - after) ** 0.5 * su
    torch.testing.assert_close(found.double(), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", [None, "karras"])
def test_dpm_2s_ancestral_is_that_of_k_diffusion(schedule: str | None) -> None:
    scheduler, noise, sigmas = started(schedule, "dpm++2s-a")
    found = run(scheduler, model, noise, torch.Generator().manual_seed(3))
    generator, x = torch.Generator().manual_seed(3), noise.double() * sigmas[0]
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        denoised = model(x, now)
        if after == 0:
            x = denoised
            break
        up = (after**2 * (now**2 - after**2) / now**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        h = np.log(now) - np.log(down)
        middle = float(np.exp(np.log(now) - h / 2))
        x2 = middle / now * x - np.expm1(-h / 2) * denoised
        x = down / now * x - np.expm1(-h) * model(x2, middle)
        x = x + torch.randn(noise.shape, generator=generator) * up
    torch.testing.assert_close(found.double(), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["karras", "exponential", "simple"])
def test_euler_ancestral_takes_every_schedule(schedule: str) -> None:
    scheduler, noise, sigmas = started(schedule, "euler-a")
    found = run(scheduler, model, noise, torch.Generator().manual_seed(3))
    generator, x = torch.Generator().manual_seed(3), noise.double() * sigmas[0]
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        up = (after**2 * (now**2 - after**2) / now**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        x = x + (x - model(x, now)) / now * (down - now)
        x = x + torch.randn(noise.shape, generator=generator) * up
    torch.testing.assert_close(found.double(), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_lms_equals_that_of_diffusers(monkeypatch: pytest.MonkeyPatch, prediction: Any) -> None:
    """diffusers' own runs here on a quadrature of numpy's, since scipy is not installed."""
    from diffusers.schedulers import scheduling_lms_discrete as module

    nodes, weights = np.polynomial.legendre.leggauss(8)

    def quad(function: Callable[[float], float], low: float, high: float, **_: Any) -> tuple[float]:
        middle, half = (low + high) / 2, (high - low) / 2
        return (sum(w * function(middle + half * node) for node, w in zip(nodes, weights, strict=True)) * half,)

    monkeypatch.setattr(module, "integrate", types.SimpleNamespace(quad=quad), raising=False)
    theirs = module.LMSDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    theirs.set_timesteps(10)
    ours = make_scheduler(SAMPLERS["lms"], ScheduleFacts(prediction=prediction), 10)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    noise = torch.randn((2, 4, 6, 6), generator=torch.Generator().manual_seed(1))
    x, y = noise * ours.init_noise_sigma, noise * theirs.init_noise_sigma
    for t in ours.timesteps:
        scaled, same = ours.scale_model_input(x, t), theirs.scale_model_input(y, t)
        x = ours.step(torch.tanh(scaled.roll(1, 2)), t, x, return_dict=False)[0]
        y = theirs.step(torch.tanh(same.roll(1, 2)), t, y, return_dict=False)[0]
    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_with_every_schedule_on_every_kind_of_base(sampler: str) -> None:
    row, kinds = SAMPLERS[sampler], [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
    for prediction, zero_terminal_snr in [*kinds, *([("sample", True)] if row.reads_sample else [])]:
        facts = ScheduleFacts(prediction=prediction, zero_terminal_snr=zero_terminal_snr)  # ty: ignore[invalid-argument-type]
        for schedule in (None, *row.schedules):
            for steps in (1, 2, 7):
                scheduler = make_scheduler(row, facts, steps, schedule)
                assert len(scheduler.timesteps) in (steps, 2 * steps - 1)
                assert scheduler.order == (1 if len(scheduler.timesteps) == steps else 2) or steps == 1
                x = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(1))
                x = x * scheduler.init_noise_sigma
                extra = {"generator": torch.Generator().manual_seed(2)} if row.adds_noise else {}
                for t in scheduler.timesteps:
                    assert 0 <= t <= 999
                    out = 0.1 * scheduler.scale_model_input(x, t)
                    x = scheduler.step(out, t, x, return_dict=False, **extra, **row.step_options)[0]
                assert x.isfinite().all(), (prediction, zero_terminal_snr, schedule, steps)


@pytest.mark.parametrize("sampler", ["dpm++2m", "euler-a", "heun", "dpm++sde", "lms", "unipc"])
def test_a_fine_schedule_of_any_kind_arrives_at_the_same_image(sampler: str) -> None:
    """For a model that always sees the same image, every sampler ends there."""
    image = torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4)
    for schedule in SCHEDULES:
        scheduler = make_scheduler(SAMPLERS[sampler], ScheduleFacts(prediction="epsilon"), 9, schedule)
        vp = sampler in ("dpm++2m", "unipc")
        x = torch.randn(image.shape, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
        extra = {"generator": torch.Generator().manual_seed(2)} if SAMPLERS[sampler].adds_noise else {}
        for t in scheduler.timesteps:
            sigma = float(scheduler.sigmas[scheduler.step_index or 0])
            signal = (sigma**2 + 1) ** -0.5 if vp else 1.0
            scheduler.scale_model_input(x, t)
            x = scheduler.step((x - signal * image) / (signal * sigma), t, x, return_dict=False, **extra)[0]
        torch.testing.assert_close(x, image, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("written", "schedule", "name", "spread"),
    [
        ("DPM++ 2M Karras", None, "dpm++2m", "karras"),
        ("dpmpp_2m", "Karras", "dpm++2m", "karras"),
        ("DPMSolverMultistepScheduler", None, "dpm++2m", None),
        ("Euler a", "SGM Uniform", "euler-a", "sgm-uniform"),
        ("euler_ancestral", "normal", "euler-a", "uniform"),
        ("k_euler_a", None, "euler-a", None),
        ("EulerAncestralDiscreteScheduler", None, "euler-a", None),
        ("DPM++ 3M SDE Exponential", None, "dpm++3m-sde", "exponential"),
        ("DPM++ 2M SDE Karras", "karras", "dpm++2m-sde", "karras"),
        ("DPM++ SDE Karras", None, "dpm++sde", "karras"),
        ("dpmpp_3m_sde_gpu", None, "dpm++3m-sde", None),
        ("DPM2 a Karras", None, "dpm2-a", "karras"),
        ("k_dpm_2_a", None, "dpm2-a", None),
        # Of kohya's sample_sampler.
        *((name, None, ours, None) for name, ours in (("ddim", "ddim"), ("k_lms", "lms"), ("dpm_2", "dpm2"))),
        *((name, None, ours, None) for name, ours in (("euler_a", "euler-a"), ("dpmsolver++", "dpm++2m"))),
        ("DPM++ 2S a Karras", None, "dpm++2s-a", "karras"),
        ("LMS Karras", None, "lms", "karras"),
        ("uni_pc", None, "unipc", None),
        ("LCMScheduler", None, "lcm", None),
        ("Heun", "ddim_uniform", "heun", "ddim"),
        # As A1111, ComfyUI and diffusers name the two.
        *(("Euler", name, "euler", "align-your-steps") for name in ("Align Your Steps", "align_your_steps", "AYS")),
        *(("dpmpp_2m", name, "dpm++2m", "kl-optimal") for name in ("KL Optimal", "kl_optimal")),
        ("magic", "Magic", "magic", "Magic"),
    ],
)
def test_names_of_other_programs(written: str, schedule: str | None, name: str, spread: str | None) -> None:
    assert read_sampler(written, schedule) == (name, spread)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "DPM++ 2M Karras", "schedule": "exponential"}, "names another schedule than 'exponential'"),
        ({"sampler": "eulr-a"}, "'eulr-a' is unknown; did you mean 'euler-a'"),
        ({"sampler": "euler", "schedule": "fast"}, "schedule 'fast' is unknown; choose one of karras"),
        ({"sampler": "magic", "schedule": "karas"}, "'magic' is unknown.*\nschedule 'karas' .* did you mean 'karras'"),
        ({"sampler": "ddim", "schedule": "karras"}, "does not work with sampler 'ddim'; choose one of linspace"),
        ({"sampler": "lcm", "schedule": "karras"}, "leave the schedule out"),
        ({"sampler": "lcm", "steps": 51}, "sampler 'lcm' makes at most 50"),
    ],
)
def test_what_does_not_go_together(tiny_base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SdloraError, match=message):
        sdlora.generate("a", base=str(tiny_base), **options)


@pytest.mark.parametrize(
    ("family", "published"), [("sd1", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas")]
)
def test_align_your_steps_equals_the_pipeline_with_the_levels_of_the_family(
    tiny_files: dict[str, Path], family: str, published: str
) -> None:
    pipe: Any = tiny_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_of("EulerDiscreteScheduler", {})
    theirs = pipe(
        "a red fox", negative_prompt="blue", sigmas=AysSchedules[published], guidance_scale=4.0, output_type="latent",
        height=64, width=64, generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip
    found = ours(tiny_files[family], "Euler", "AYS", steps=10, size=64)
    assert (found - theirs).abs().max() < 1e-4


def test_align_your_steps_is_in_the_recipe(tiny_base: Path) -> None:
    image = sdlora.generate("a", base=tiny_base, steps=1, schedule="Align Your Steps")[0]
    assert ", Timestep spacing: align-your-steps, " in image.parameters


def test_align_your_steps_does_not_start_from_pure_noise(tiny_base: Path) -> None:
    base = BaseSection(path=str(tiny_base), prediction="v_prediction", zero_terminal_snr=True)
    sdlora.generate("a", base=base, schedule="kl-optimal", steps=1)
    with pytest.raises(
        SdloraError, match=r"'align-your-steps' was published .* without zero-terminal SNR.*choose karras"
    ):
        sdlora.generate("a", base=base, schedule="align-your-steps", steps=1)


def test_progress_counts_steps_whatever_a_step_takes(tiny_base: Path) -> None:
    class Counting(Silence):
        total, done = 0, 0

        def start(self, task: str, total: int, done: int = 0) -> None:
            self.total += total

        def advance(self, count: int = 1, note: str = "") -> None:
            self.done += count

    for sampler in ("euler", "heun", "dpm2", "dpm++sde"):
        counting = Counting()
        sdlora.generate(["a", "b"], base=str(tiny_base), sampler=sampler, steps=3, seed=1, progress=counting)
        assert (counting.done, counting.total) == (6, 6)


@pytest.mark.parametrize("phi", [0.7, 1.0])
def test_guidance_rescale_equals_the_diffusers_pipeline(
    pipe: StableDiffusionPipeline, tiny_base: Path, phi: float
) -> None:
    pipe.scheduler = scheduler_of("EulerDiscreteScheduler", {})
    theirs = pipe(
        "a red fox", negative_prompt="blue", num_inference_steps=STEPS, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(7), guidance_rescale=phi,
    ).images[0]  # fmt: skip
    found = ours(tiny_base, "euler", guidance_rescale=phi)
    assert (found - theirs).abs().max() < 1e-4
    assert (found - ours(tiny_base, "euler")).abs().max() > 1e-3


def test_guidance_rescale_is_in_the_recipe_and_within_bounds(tiny_base: Path) -> None:
    image = sdlora.generate("a", base=str(tiny_base), steps=1, guidance_rescale=0.7)[0]
    assert ", CFG scale: 5, CFG Rescale: 0.7, Seed: " in image.parameters
    with pytest.raises(SdloraError, match="guidance_rescale 2: expected a number from 0 to 1"):
        sdlora.generate("a", base=str(tiny_base), guidance_rescale=2)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # diffusers' own DPM2, here
@pytest.mark.parametrize(
    ("sampler", "name", "options"),
    [
        ("heun", "HeunDiscreteScheduler", KARRAS),
        ("dpm2", "KDPM2DiscreteScheduler", KARRAS),
        ("unipc", "UniPCMultistepScheduler", KARRAS),
        ("dpm++2m-sde", "DPMSolverMultistepScheduler", SDE | KARRAS),
    ],
)
def test_image_to_image_with_each_kind_of_sampler(
    pipe: StableDiffusionPipeline, tiny_base: Path, sampler: str, name: str, options: dict[str, Any]
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    theirs = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = scheduler_of(name, options)
    expected = theirs(
        "a red fox", image=image, strength=0.5, negative_prompt="blue", num_inference_steps=STEPS, guidance_scale=4.0,
        output_type="latent", generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip
    found = ours(tiny_base, sampler, "karras", image=image, strength=0.5)
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("sampler", ["heun", "dpm2", "dpm++sde", "lcm", "lms"])
def test_what_a_mask_keeps_stays(tiny_base: Path, sampler: str) -> None:
    image = Image.new("RGB", (64, 64), (90, 160, 30))
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    latents = [
        ours(tiny_base, sampler, image=image, mask=mask, mask_blur=0, strength=0.7, prompt=prompt)
        for prompt in ("a red fox", "snow")
    ]
    kept, painted = ((latents[0] - latents[1]).abs()[..., columns].max() for columns in (slice(0, 3), slice(5, 8)))
    assert kept == 0
    assert painted > 0
