"""Configurations of kohya's trainer: what they become, compared with independent statements of what it does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from sdlora.base.checkpoint import find_base
from sdlora.base.load import load_base
from sdlora.cli import app
from sdlora.config.kohya_names import NOT_SUPPORTED
from sdlora.config.kohya_reference import kohya_markdown
from sdlora.config.kohya_rules import HARMLESS, RULES
from sdlora.config.kohya_training import read_kohya, same_settings
from sdlora.config.loading import load_stated
from sdlora.config.sections import Config
from sdlora.errors import ConfigError
from sdlora.training.module_choice import choose_modules
from sdlora.training.objective import level_weights
from sdlora.training.rates import rate_factor
from tests.conftest import ROOT, write_images

CPU, META = torch.device("cpu"), torch.device("meta")
COMMAND = "accelerate launch --num_processes=1 train_network.py --train_data_dir i --resolution 512 --output_name x "


def config_of(options: str = "", *more: str, source: str | None = None) -> Config:
    written = read_kohya(source or COMMAND + options).written
    return load_stated(written, ["data.trigger=zorb", *more]).config


def problems_of(source: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_kohya(source)
    return list(caught.value.problems)


def kohyas_modules(model: nn.Module, *, convolutions: bool) -> list[nn.Module]:
    """What networks/lora.py finds: linear layers and convolutions by the class of what they are in."""
    parents = {"Transformer2DModel", "CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"}
    if convolutions:
        parents |= {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
    return [
        child
        for parent in model.modules()
        if type(parent).__name__ in parents
        for child in parent.modules()
        if isinstance(child, nn.Linear)
        or (isinstance(child, nn.Conv2d) and (convolutions or child.kernel_size == (1, 1)))
    ]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_the_modules_are_those_of_kohyas_trainer(tiny_files: dict[str, Path], family: str, convolutions: bool) -> None:
    options = "--network_dim 8 --network_alpha 4 " + "--network_args conv_dim=2 conv_alpha=1 " * convolutions
    checkpoint = find_base(str(tiny_files[family]))
    base = load_base(checkpoint, device=META, dtype=torch.float32)
    names = {id(module): name for name, module in base.modules().items()}
    models = (base.unet, *(encoder.model for encoder in base.text_encoders))
    expected = {
        names[id(module)]: isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        for model in models
        for module in kohyas_modules(model, convolutions=convolutions)
    }
    chosen = choose_modules(checkpoint, config_of(options + "--learning_rate 1e-4"))
    assert chosen.keys() == expected.keys()
    for name, large in expected.items():
        assert (chosen[name].rank, chosen[name].alpha) == ((2, 1.0) if large else (8, 4.0)), name


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ("", lambda snr: torch.ones_like(snr)),
        ("--min_snr_gamma 5", lambda snr: torch.clamp(5 / snr, max=1)),
        ("--debiased_estimation_loss", lambda snr: 1 / torch.sqrt(torch.clamp(snr, max=1000))),
    ],
)
def test_the_weighting_is_kohyas(tiny_files: dict[str, Path], options: str, formula) -> None:
    """Its ``apply_snr_weight`` and ``apply_debiased_estimation``, in float64."""
    base = load_base(find_base(str(tiny_files["sd1"])), device=CPU, dtype=torch.float32)
    timesteps = torch.tensor([0, 100, 500, 900, 999])
    alphas = base.schedule.alphas_cumprod.double().cpu()[timesteps]
    weights = level_weights(timesteps, base.schedule, config_of(options).objective)
    torch.testing.assert_close(weights.double(), formula(alphas / (1 - alphas)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *(
            ("constant", {}),
            ("constant_with_warmup", {}),
            ("linear", {}),
            ("cosine", {}),
            ("polynomial", {"power": 1.0}),
        ),
        ("cosine_with_restarts", {"num_cycles": 3}),
    ],
)
def test_the_schedule_is_kohyas(name: str, more: dict[str, float]) -> None:
    """Kohya's trainer takes diffusers' schedules, but gives ``constant`` no warm-up."""
    steps, warmup = 100, 10
    options = f"--lr_scheduler {name} --lr_warmup_steps {warmup} --max_train_steps {steps} "
    options += "--lr_scheduler_num_cycles 3" if more.get("num_cycles") else ""
    section = config_of(options).optimizer
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, **more)
    theirs = []
    for _ in range(steps):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [rate_factor(step, section, steps=steps) for step in range(steps)]
    np.testing.assert_allclose(ours[warmup:], theirs[warmup:], atol=2e-7)
    np.testing.assert_allclose(ours[:warmup], theirs[:warmup], atol=1 / warmup)


def test_what_is_not_stated_is_as_kohya_has_it() -> None:
    """The defaults in the parsers of train_util.py and train_network.py."""
    config = config_of()
    assert (config.lora.rank, config.lora.alpha) == (4, 1.0)
    assert (config.optimizer.learning_rate, config.optimizer.text_encoder_learning_rate) == (2e-6, 2e-6)
    assert (config.optimizer.schedule, config.optimizer.warmup_steps, config.optimizer.betas) == (
        *("constant", 0),
        (0.9, 0.999),
    )
    assert (config.train.steps, config.train.batch_size, config.objective.weighting) == (1600, 1, "none")
    assert (config.data.caption_extension, config.data.max_token_length, config.data.enable_bucket) == (
        ".caption",
        75,
        False,
    )
    assert (config.train.precision, config.output.precision, config.base.prediction) == (
        "float32",
        "float32",
        "epsilon",
    )


def test_rates_and_parts() -> None:
    rates = {
        "--learning_rate 1e-4": (1e-4, 1e-4),
        "--learning_rate 1e-4 --unet_lr 2e-4": (2e-4, 1e-4),
        "--learning_rate 1e-4 --text_encoder_lr 5e-5": (1e-4, 5e-5),
        "--learning_rate 1e-4 --text_encoder_lr 5e-5 1e-5": (1e-4, (5e-5, 1e-5)),
        "--learning_rate 1e-4 --text_encoder_lr 5e-5 5e-5": (1e-4, 5e-5),
        "--learning_rate 1e-4 --network_train_unet_only": (1e-4, 0.0),
        "--learning_rate 1e-4 --network_train_text_encoder_only": (0.0, 1e-4),
    }
    for options, expected in rates.items():
        section = config_of(options).optimizer
        assert (section.learning_rate, section.text_encoder_learning_rate) == expected, options


def test_gradients_that_kohya_does_not_clip_are_not_clipped() -> None:
    assert config_of("--max_grad_norm 0").optimizer.max_grad_norm == 0
    assert config_of("").optimizer.max_grad_norm == 1


def test_dropout_and_the_limit_of_norms_are_translated() -> None:
    section = config_of("--network_dropout 0.1 --scale_weight_norms 1 --network_args module_dropout=.2").lora
    assert (section.dropout, section.max_norm, section.module_dropout) == (0.1, 1.0, 0.2)
    section = config_of("--network_dropout 0 --scale_weight_norms 0").lora
    assert (section.dropout, section.max_norm) == (0.0, None)


def test_a_command_line_with_everything() -> None:
    config = config_of(
        "--network_module=networks.lora --optimizer_type=AdamW8bit --optimizer_args weight_decay=0.1 betas=.9,.99 "
        "--network_args loraplus_lr_ratio=4 --max_train_epochs=10 --mixed_precision=fp16 --save_precision=bf16 "
        "--enable_bucket \\\n --v_parameterization --noise_offset=0.1 --clip_skip=2 --seed 42 --shuffle_caption "
        "--keep_tokens 1 --metadata_tags 'a, b' --output_dir 'my out' --resolution=640,640 --random_crop"
    )
    assert config.output.path == "my out/x.safetensors"
    assert config.output.tags == ("a", "b")
    assert (config.optimizer.name, dict(config.optimizer.arguments)) == (
        "adamw8bit",
        {"weight_decay": 0.1, "betas": (0.9, 0.99)},
    )
    assert (config.optimizer.lora_plus_ratio, config.train.epochs, config.train.precision) == (4.0, 10.0, "float16")
    assert (config.output.precision, config.base.prediction, config.base.clip_skip) == ("bfloat16", "v_prediction", 2)
    assert (config.data.resolution, config.data.max_bucket_reso, config.data.bucket_rule) == (640, 1024, "kohya")
    assert (config.data.shuffle_tags, config.data.keep_tokens, config.data.crop, config.train.seed) == (
        True,
        1,
        "random",
        42,
    )
    assert config.objective.noise_offset == 0.1


def test_files_say_the_same_as_a_command_line(tmp_path: Path) -> None:
    toml, gui, text = (tmp_path / name for name in ("k.toml", "k.json", "run.sh"))
    toml.write_text(
        '[model]\nnetwork_dim = 8\nnetwork_alpha = 4\n[data]\ntrain_data_dir = "i"\nresolution = "512,512"\n'
        'output_name = "x"\nlearning_rate = 1e-4\nnetwork_train_unet_only = true\nxformers = false\n'
    )
    saved = {
        "LoRA_type": "Standard",
        "network_dim": 8,
        "network_alpha": 4,
        "train_data_dir": "i",
        "learning_rate": 1e-4,
    }
    saved |= {"max_resolution": "512,512", "output_name": "x", "unet_lr": 1e-4, "text_encoder_lr": 0, "epoch": 0}
    saved |= {"conv_dim": 1, "noise_offset": 0, "model_list": "custom", "color_aug": False, "vae": ""}
    gui.write_text(json.dumps(saved))
    options = "--network_dim 8 --network_alpha 4 --learning_rate 1e-4 --network_train_unet_only"
    text.write_text(COMMAND + options)
    expected = config_of(options).flat()
    for file in (toml, gui, text):
        assert config_of(source=str(file)).flat() == expected, file
    toml.write_text(toml.read_text().replace("network_dim = 8", "network_dim = 8000"))
    with pytest.raises(ConfigError, match=rf"{toml}:2 \(network_dim\): lora.rank = 8000: must be at most 1024"):
        config_of(source=str(toml))


def saved_config(folder: Path, **fields: object) -> Config:
    file = folder / "saved.json"
    file.write_text(json.dumps({"train_data_dir": "i", "max_resolution": "512,512", "output_name": "x"} | fields))
    return config_of(source=str(file))


def test_what_kohya_ss_saves_is_what_it_would_start(tmp_path: Path) -> None:
    """``train_model`` in kohya_gui/lora_gui.py, which has these fields for every model and kind."""
    config = saved_config(
        tmp_path, sdxl_no_half_vae=True, train_on_input=True, use_cp=True, weighting_scheme="logit_normal", t5xxl="x",
        noise_offset_type="Multires", noise_offset=0.1, adaptive_noise_scale=0.00357, multires_noise_iterations=6,
        stop_text_encoder_training=30, epoch=1, max_train_steps=1600, lr_scheduler="cosine_with_restarts",
        optimizer_args='"weight_decay=0.2"', xformers="sdpa", flux1_checkbox=False, guidance_scale=3.5,
    )  # fmt: skip
    assert (config.train.steps, config.train.epochs, config.base.attention) == (1600, None, "sdpa")
    assert (config.objective.noise_offset, config.objective.multires_noise_iterations) == (0, 6)
    assert config.optimizer.text_encoder_stop is None
    assert dict(config.optimizer.arguments) == {"weight_decay": 0.2}
    for steps in (0, "", "0"):
        config = saved_config(tmp_path, epoch=3, max_train_steps=steps, lr_scheduler_num_cycles="", xformers="none")
        assert (config.train.epochs, config.optimizer.schedule_cycles, config.base.attention) == (3, 3, "auto")
    config = saved_config(tmp_path, noise_offset_type="Original", noise_offset=0.1, multires_noise_iterations=6)
    assert (config.objective.noise_offset, config.objective.multires_noise_iterations) == (0.1, 0)
    config = saved_config(tmp_path, learning_rate=1e-4, unet_lr=0, text_encoder_lr=0, xformers="xformers")
    assert (config.optimizer.learning_rate, config.optimizer.text_encoder_learning_rate) == (1e-4, 1e-4)
    assert config.base.attention == "xformers"


def test_fields_of_kohya_ss_that_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"saved.json: flux1_checkbox is set; only Stable Diffusion"):
        saved_config(tmp_path, flux1_checkbox=True)
    with pytest.raises(ConfigError, match=r"unet_lr = 'fast'"):
        saved_config(tmp_path, unet_lr="fast")
    with pytest.raises(ConfigError, match="down_lr_weight"):
        saved_config(tmp_path, down_lr_weight="0,1")


def test_the_length_in_a_toml_file_that_kohya_ss_wrote(tmp_path: Path) -> None:
    """It states its own ``epoch`` and ``noise_offset_type`` beside the trainer's options, which the trainer ignores."""
    file = tmp_path / "k.toml"
    options = 'train_data_dir = "i"\nresolution = 512\noutput_name = "x"\nepoch = 1\nnoise_offset_type = "Original"\n'
    file.write_text(options + "max_train_steps = 800\n")
    config = config_of(source=str(file))
    assert (config.train.steps, config.train.epochs) == (800, None)
    file.write_text(options)
    assert any("epoch = 1 cannot be followed" in problem for problem in problems_of(str(file)))


def test_all_that_cannot_be_followed_is_refused_by_name() -> None:
    problems = problems_of(
        COMMAND + "--network_module lycoris.kohya --color_aug --gradient_accumulation_steps 2 --no_such_option 1 "
        "--lr_scheduler adafactor --masked_loss --network_args down_lr_weight=1 --fp8_base --learning_rate fast "
        "--min_snr_gamma 5 --debiased_estimation_loss --resolution 512,768 --optimizer_type Adafactor"
    )
    named = (
        "network_module",
        "color_aug",
        "gradient_accumulation_steps",
        "no_such_option",
        "lr_scheduler",
        "masked_loss",
    )
    named += ("down_lr_weight", "fp8_base", "debiased_estimation_loss", "resolution", "relative_step")
    for name in named:
        assert sum(name in problem for problem in problems) == 1, (name, problems)
    assert problems_of("accelerate launch train_db.py --seed 1") == [
        "command line: train_db.py is another script; only train_network.py and sdxl_train_network.py can be followed"
    ]
    assert problems_of("nothing") == ["nothing: no such file, and not a command line with --options"]


def test_what_is_left_out_is_said() -> None:
    (line,) = read_kohya(COMMAND + "--cache_latents").left_out
    assert line == "command line: --cache_latents: cache_latents is left out: images are always encoded only once"


def test_no_option_is_unsupported_and_translated() -> None:
    assert not same_settings().keys() & NOT_SUPPORTED - RULES.keys() - HARMLESS


def test_the_page_is_fresh() -> None:
    """Run ``python -m sdlora.config.kohya_reference > docs/from-kohya.md`` where it is not."""
    assert (ROOT / "docs" / "from-kohya.md").read_text(encoding="utf-8") == kohya_markdown()


def test_a_length_beside_it_takes_its_place(tiny_base: Path, tmp_path: Path, capsys) -> None:
    write_images(tmp_path / "images", 2)
    command = f"train_network.py --train_data_dir {tmp_path / 'images'} --resolution 64 --output_name x "
    command += (
        f"--caption_extension .txt --max_train_epochs 4 --network_dim 3 --pretrained_model_name_or_path {tiny_base}"
    )
    arguments = ["train", "--from-kohya", command, "--trigger", "zorb", "--steps", "7", "--explain", "--json"]
    assert not app(arguments, standalone_mode=False)
    settings = {each["name"]: each for each in json.loads(capsys.readouterr().out)["settings"]}
    assert (settings["train.steps"]["value"], settings["train.epochs"]["value"]) == (7, None)
    assert (settings["lora.rank"]["value"], settings["lora.rank"]["source"]) == (
        3,
        "command line: --network_dim (network_dim)",
    )
    assert settings["train.batch_size"]["source"] == "kohya's default of train_batch_size"
