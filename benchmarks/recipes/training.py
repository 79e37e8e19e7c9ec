"""Three ways to train: ours, the diffusers example's recipe in a plain loop, and full fine-tuning of the same modules."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

import sdlora
from sdlora.base.base import Base
from sdlora.base.checkpoint import MINI_FOLDER
from sdlora.base.encode import encode_ids
from sdlora.config.loading import load_config
from sdlora.config.sections import Config
from sdlora.progress import Silence
from sdlora.training.loss import denoising_loss
from sdlora.training.new_adapter import new_trainables
from sdlora.training.plan import plan_config
from sdlora.training.preparation import Preparation
from sdlora.training.rates import rate_factor
from sdlora.training.session import open_session
from tests.measures import TRIGGERS

from .measuring import Trained
from .samples import pixels, split
from .variants import COMMON, Variant


def config_of(
    variant: Variant, style: str, seed: int, *, steps: int, rank: int, folder: Path, more: Sequence[str] = ()
) -> Config:
    """The configuration of a run; ``steps`` and ``rank`` are those of every variant that does not state its own, and
    ``more`` are settings that come last.

    Raises:
        ConfigError: a setting that this version does not know.
    """
    train, _ = split(style, folder)
    settings = (*(setting.format(rank=rank) for setting in COMMON), f"train.steps={steps}", *variant.stated(rank))
    places = (
        f"data.images={train}", f"data.trigger={TRIGGERS[style]}", f"train.seed={seed}",
        f"output.path={folder / 'run' / 'lora.safetensors'}", f"cache.folder={folder / 'cache'}",
    )  # fmt: skip
    return load_config(None, [*settings, *places, *more])


def train_variant(variant: Variant, config: Config, base: Base) -> Trained:
    """Train as ``variant`` says; ``base`` stays as it is."""
    shutil.rmtree(Path(config.output.path).parent, ignore_errors=True)
    if variant.how == "nothing":
        return Trained(base=base)
    if variant.how == "full":
        return Trained(base=full_loop(config, base))
    if variant.how == "peft":
        return Trained(base=base, files=(f"{plain_loop(config, variant.learning_rate or 1e-4)}:1",))
    sdlora.train(config, restart=True, progress=Silence())
    return Trained(base=base, files=_files(Path(config.output.path), variant.averaged))


def _files(output: Path, averaged: int) -> tuple[str, ...]:
    """The output, or the newest files: at 1 / n each, their changes add up to their mean."""
    if not averaged:
        return (f"{output}:1",)
    newest = [*sorted(output.parent.glob(f"{output.stem}-*.safetensors")), output][-averaged:]
    return tuple(f"{file}:{1 / len(newest):.6f}" for file in newest)


def plain_loop(config: Config, learning_rate: float) -> Path:
    """diffusers' ``train_text_to_image_lora.py`` by its settings: rank and alpha the same, Gaussian start, UNet attention
    alone, AdamW at a constant rate, plain mean squared error of uniform noise levels, gradients clipped at 1.

    The models are diffusers', the layers peft's, and all random numbers torch's. Returns the file, written by diffusers.
    """
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(MINI_FOLDER, torch_dtype=torch.float32)
    noises = DDPMScheduler.from_config(pipe.scheduler.config)
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        model.requires_grad_(False)
    rank, size = config.lora.rank, pipe.unet.config.sample_size * pipe.vae_scale_factor
    torch.manual_seed(config.train.seed)
    pipe.unet.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    files = sorted(Path(str(config.data.images)).glob("*.png"))
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels(files, size)).latent_dist
        captions = [file.with_suffix(".txt").read_text().strip() for file in files]
        ids = pipe.tokenizer(
            captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        context = pipe.text_encoder(ids)[0]
    order: list[int] = []
    pipe.unet.train()
    for _ in range(config.train.steps or 0):
        if len(order) < config.train.batch_size:
            order = torch.randperm(len(files)).tolist()
        rows, order = order[: config.train.batch_size], order[config.train.batch_size :]
        latents = posterior.sample()[rows] * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, noises.config.num_train_timesteps, (len(rows),))
        predicted = pipe.unet(noises.add_noise(latents, noise, timesteps), timesteps, context[rows]).sample
        velocity = noises.config.prediction_type == "v_prediction"
        target = noises.get_velocity(latents, noise, timesteps) if velocity else noise
        torch.nn.functional.mse_loss(predicted, target).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    file = Path(config.output.path)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(str(file.parent), unet_lora_layers=layers, weight_name=file.name)
    return file


def full_loop(config: Config, base: Base, *, watch: Callable[[int, Base], None] = lambda done, tuned: None) -> Base:
    """A copy of ``base`` whose modules that a LoRA would change are trained themselves.

    Batches, noise, objective, rates and schedule are those of the run that ``config`` describes; the optimizer is torch's.
    ``watch`` is called after each step with the number of steps and the model.
    """
    tuned = copy.deepcopy(base)
    plan = plan_config(config)
    session = open_session(plan, tuned, Accelerator(), Silence())
    config, modules = plan.config, tuned.modules()
    weights: Mapping[str, list[torch.nn.Parameter]] = {"unet": [], "text_encoder": []}
    for name in new_trainables(tuned, config):
        weights[name.partition(".")[0]].append(modules[name].weight.requires_grad_())
    section, steps = config.optimizer, config.train.steps
    rates = {"unet": section.learning_rate, "text_encoder": section.text_encoder_learning_rate}
    groups = [{"params": weights[part], "peak": rate} for part, rate in rates.items() if weights[part]]
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=section.betas, weight_decay=section.weight_decay, eps=section.epsilon
    )
    preparation = Preparation(
        plan=plan, base=tuned, images=session.images, embeddings=session.embeddings, process=0, processes=1
    )
    trained = [weight for part in weights.values() for weight in part]
    for step in range(steps):
        for inputs in preparation.prepare(step).parts(tuned.device, config.train.batch_size):
            ids = inputs.token_ids
            conditioning = encode_ids(tuned, ids) if ids else session.embeddings.encode(inputs.captions)
            losses = denoising_loss(
                tuned, inputs.latents, inputs.noise, inputs.timesteps, conditioning,
                inputs.time_ids, objective=config.objective, input_noise=inputs.input_noise,
            )  # fmt: skip
            losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, section.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_factor(step, section, steps=steps)
        optimizer.step()
        optimizer.zero_grad()
        watch(step + 1, tuned)
    for weight in trained:
        weight.requires_grad_(False)
    return tuned
