"""Every setting changes what it says that it changes: a table over the whole catalogue, so none is forgotten or ignored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import sdlora as package
from sdlora.base.base import Base
from sdlora.base.load import load_base
from sdlora.config.catalogue import all_settings
from sdlora.config.loading import load_config
from sdlora.errors import SdloraError
from sdlora.formats.safetensors_file import read_header
from sdlora.progress import Silence
from sdlora.training.metadata import training_metadata
from sdlora.training.plan import plan_config
from sdlora.training.session import open_session
from tests.conftest import ROOT, write_images
from tests.test_formats import facts
from tests.training_runs import toml

Outcome = Callable[..., object]
RULE = 'lora.rules=[{pattern = "unet.*.attn1", %s}]'
HUBER, KOHYA, DRAWN = "objective.loss=huber", "data.bucket_rule=kohya", "data.shuffle_tags=true"
LARGER = ("data.resolution=128", "data.bucket_reso_steps=16")
RESTARTS, POLYNOMIAL = "optimizer.schedule=cosine_with_restarts", "optimizer.schedule=polynomial"
NORMAL, SHIFTED = "objective.timestep_sampling=logit_normal", "objective.timestep_sampling=shifted"

VALUES: dict[str, tuple[str, ...]] = {
    "preset": ("style",),
    "base.prediction": ("sample",),
    "base.zero_terminal_snr": ("true", "base.prediction=v_prediction"),
    "base.clip_skip": ("2",),
    "base.quantization": ("int8",),
    "data.trigger": ("other",),
    "data.trigger_as": ("prefix", "data.trigger=cat"),
    "data.caption_template": ("'{caption} by {trigger}'", "data.trigger_as=template"),
    "data.caption_replace": ('[["cat", "dog"]]',),
    "data.caption_dropout": ("0.9",),
    "data.allow_missing_captions": ("true", "data.caption_extension=.missing"),
    "data.max_token_length": ("75",),
    "data.enable_bucket": ("false",),
    "data.bucket_rule": ("kohya",),
    "data.min_bucket_reso": ("96", KOHYA, *LARGER),
    "data.max_bucket_reso": ("128", KOHYA, *LARGER),
    "data.bucket_reso_steps": ("32", KOHYA, *LARGER),
    "data.bucket_no_upscale": ("true", KOHYA),
    "data.mask": ("alpha",),
    "data.alpha_background": ("'#ff0000'",),
    "data.caption_extension": (".caption",),
    "data.caption_lines": ("first",),
    "data.wildcards": ("true",),
    "data.caption_prefix": ("photo",),
    "data.caption_suffix": ("photo",),
    "data.shuffle_tags": ("true",),
    "data.keep_tokens": ("2", DRAWN),
    "data.tag_dropout": ("0.9",),
    "data.resolution": ("80",),
    "data.crop": ("random",),
    "data.flip": ("true",),
    "lora.rank": ("3",),
    "lora.alpha": ("3",),
    "lora.kind": ("loha",),
    "lora.rslora": ("true",),
    "lora.conv_rank": ("2", "lora.kind=locon"),
    "lora.conv_alpha": ("2", "lora.kind=locon"),
    "lora.factor": ("2", "lora.kind=lokr", "lora.rank=1"),
    "lora.targets": ("linear",),
    "lora.rules": ('[{pattern = "unet.*.attn1", rank = 2}]',),
    "lora.init": ("orthogonal",),
    "lora.dropout": ("0.3",),
    "lora.rank_dropout": ("0.3",),
    "lora.module_dropout": ("0.3",),
    "lora.max_norm": ("0.01",),
    "objective.loss": ("huber",),
    "objective.huber_c": ("0.3", HUBER),
    "objective.huber_schedule": ("constant", HUBER),
    "objective.weighting": ("none",),
    "objective.min_snr_gamma": ("1",),
    "objective.noise_offset": ("0.1",),
    "objective.multires_noise_iterations": ("3",),
    "objective.multires_noise_discount": ("0.7", "objective.multires_noise_iterations=3"),
    "objective.input_perturbation": ("0.1",),
    "objective.min_timestep": ("700",),
    "objective.max_timestep": ("300",),
    "objective.timestep_sampling": ("logit_normal",),
    "objective.logit_mean": ("1", NORMAL),
    "objective.logit_std": ("0.5", NORMAL),
    "objective.timestep_shift": ("2", SHIFTED),
    "optimizer.name": ("lion",),
    "optimizer.arguments": ("{betas = [0.5, 0.9]}", "optimizer.name=lion"),
    "optimizer.learning_rate": ("2e-2",),
    "optimizer.text_encoder_learning_rate": ("2e-2",),
    "optimizer.lora_plus_ratio": ("4",),
    "optimizer.text_encoder_stop": ("1",),
    "optimizer.schedule": ("linear",),
    "optimizer.schedule_cycles": ("3", RESTARTS),
    "optimizer.schedule_power": ("2", POLYNOMIAL),
    "optimizer.warmup_steps": ("5",),
    "optimizer.weight_decay": ("0.5",),
    "optimizer.betas": ("[0.5, 0.9]",),
    "optimizer.epsilon": ("1e-2",),
    "optimizer.max_grad_norm": ("1e-3",),
    "optimizer.ema": ("0.9",),
    "train.steps": ("13",),
    "train.epochs": ("2",),
    "train.batch_size": ("1",),
    "train.seed": ("1",),
}
"""Setting -> another value for it, and the settings under which it does something."""
WITHIN: dict[str, tuple[str, str]] = {
    "lora.rules.pattern": (RULE % "rank = 2", RULE.replace("attn1", "attn2") % "rank = 2"),
    "lora.rules.rank": (RULE % "alpha = 2", RULE % "alpha = 2, rank = 2"),
    "lora.rules.alpha": (RULE % "rank = 2", RULE % "rank = 2, alpha = 2"),
    "lora.rules.learning_rate": (RULE % "rank = 2", RULE % "rank = 2, learning_rate = 1e-3"),
    "lora.rules.train": (RULE % "rank = 2", RULE % "rank = 2, train = false"),
}
"""Key of a rule -> rules without and with it."""
SETS: dict[str, tuple[object, dict[str, object]]] = {
    "role": ("regularisation", {}),
    "repeats": (3, {}),
    "loss_weight": (0.5, {}),
    "subfolders": (False, {}),
    "trigger": ("other", {}),
    "class_prompt": ("a thing", {"role": "regularisation", "images": "bare"}),
    "caption_extension": (".caption", {}),
    "caption_lines": ("first", {}),
    "wildcards": (True, {}),
    "caption_prefix": ("photo", {}),
    "caption_suffix": ("photo", {}),
    "shuffle_tags": (True, {}),
    "keep_tokens": (2, {"shuffle_tags": True}),
    "tag_dropout": (0.9, {}),
    "resolution": (80, {}),
    "crop": ("random", {}),
    "flip": (True, {}),
}
"""Key of a set -> another value for it in the second of two sets, and what the set needs beside it."""
TEXTS = {
    "output.metadata": "minimal",
    "output.title": "Title",
    "output.author": "Author",
    "output.license": "License",
    "output.description": "Words",
    "output.tags": '["style"]',
    "output.usage_hint": "Hint",
    "output.comment": "Comment",
}
"""Setting that changes the file's metadata alone -> another value for it."""
FILES = {"train.precision": "bfloat16", "output.precision": "float32"}
"""Setting that a whole run shows -> another value for it."""
ELSEWHERE = {
    "base.path": "test_resume.py",
    "base.vae": "test_families.py",
    "base.text_encoder": "test_checkpoints.py",
    "base.text_encoder_2": "test_checkpoints.py",
    "base.attention": "test_families.py",
    "data.images": "training_runs.py",
    "data.sets": "test_resume.py",
    "data.metadata": "test_tables.py",
    "data.dataset_config": "test_kohya_toml.py",
    "data.sets.images": "test_sources.py",
    "data.sets.metadata": "test_tables.py",
    "data.sets.masks": "test_sources.py",
    "cache.disk": "test_resume.py",
    "cache.folder": "test_resume.py",
    "cache.max_gigabytes": "test_resume.py",
    "lora.start_from": "test_start_from.py",
    "objective.prior_loss_weight": "test_training_losses.py",
    "train.gradient_checkpointing": "test_families.py",
    "train.micro_batch": "test_accumulation.py",
    "train.fit": "test_fit.py",
    "train.compile": "test_compiling.py",
    "train.deterministic": "test_device_change.py",
    "train.save_every": "training_runs.py",
    "train.keep_state": "test_extension.py",
    "samples.prompts": "test_samples.py",
    **{
        f"samples.{key}": "test_samples_on_the_way.py"
        for key in (
            "every",
            "every_epochs",
            "at_first",
            "negative",
            "seed",
            "steps",
            "guidance",
            "size",
            "sampler",
            "schedule",
        )
    },
    "validation.every": "test_validation_course.py",
    "validation.stop": "test_validation_course.py",
    "output.path": "training_runs.py",
    "output.save_every": "test_exports.py",
    "output.save_every_epochs": "test_samples_on_the_way.py",
    "output.tracker": "test_tracker.py",
    "output.keep": "test_exports.py",
    "output.log": "test_loss_log.py",
    "output.thumbnail": "test_samples.py",
}
"""Setting -> the file of the tests that hold what it does."""

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes with transparency, and captions in which everything can be drawn."""
    folder = tmp_path_factory.mktemp("settings") / "images"
    (folder / "more").mkdir(parents=True)
    write_images(folder.parent / "others", 1)
    (write_images(folder.parent / "bare", 1) / "0.txt").unlink()
    long = ", ".join(f"word {number}" for number in range(60))
    captions = [
        "a {red|blue} cat, on paper, big\nsecond line, small, round",
        f"cat, {long}",
        "a zorb, two, three, four",
    ]
    names = ["0", "1", "2", "more/3"]
    for number, (name, size) in enumerate(zip(names, [(64, 64), (200, 60), (36, 80), (64, 64)], strict=True)):
        image = Image.effect_noise(size, 60 + 40 * number).convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(size))
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(captions[number % 3], encoding="utf-8")
        (folder / f"{name}.caption").write_text(f"another caption {number}", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def outcome(tiny_base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Digest of the values after a few steps under the given settings, or what is refused."""
    common = (
        "data.trigger=zorb", f"base.path={tiny_base}", f"output.path={tmp_path_factory.mktemp('out') / 'x.safetensors'}",
        "cache.disk=false", "train.batch_size=4", "lora.rank=4", "optimizer.learning_rate=1e-2",
        "optimizer.text_encoder_learning_rate=1e-3",
        "optimizer.warmup_steps=0", "samples.prompts=[]", "data.resolution=64",
    )  # fmt: skip
    loaded: dict[object, Base] = {}

    @cache
    def digest(*settings: str) -> object:
        images = () if any(each.startswith("data.sets=") for each in settings) else (f"data.images={folder}",)
        try:
            plan = plan_config(load_config(None, [*common, *images, *settings]))
        except SdloraError as error:
            return str(error)
        key = plan.config.base
        if key not in loaded:
            loaded[key] = load_base(plan.base, device=torch.device("cpu"), dtype=torch.float32)
        session = open_session(plan, loaded[key], Accelerator(), Silence())
        with session.attached():
            for step in range(STEPS):
                session.step(step)
            with session.averaged():
                values = [parameter.detach().numpy().tobytes() for parameter in session.adapter.parameters]
        return hashlib.sha256(b"".join(values)).hexdigest()

    return digest


def test_the_tables_hold_every_setting_once() -> None:
    tables = [*VALUES, *WITHIN, *(f"data.sets.{key}" for key in SETS), *TEXTS, *FILES, *ELSEWHERE]
    assert sorted(tables) == sorted(setting.name for setting in all_settings())
    affects = {setting.name: setting.affects for setting in all_settings()}
    assert {affects[name] for name in [*VALUES, *WITHIN, *FILES]} == {"weights"}
    assert {affects[name] for name in TEXTS} == {"text"}


@pytest.mark.parametrize("setting", ELSEWHERE)
def test_the_other_settings_have_tests_of_their_own(setting: str) -> None:
    assert setting.rpartition(".")[2] in (ROOT / "tests" / ELSEWHERE[setting]).read_text(encoding="utf-8")


@pytest.mark.parametrize("setting", VALUES)
def test_another_value_trains_other_weights(setting: str, outcome: Outcome) -> None:
    value, *context = VALUES[setting]
    assert outcome(*context, f"{setting}={value}") != outcome(*context)


@pytest.mark.parametrize("setting", WITHIN)
def test_another_rule_trains_other_weights(setting: str, outcome: Outcome) -> None:
    without, changed = WITHIN[setting]
    assert outcome(changed) != outcome(without)


@pytest.mark.parametrize("key", SETS)
def test_another_set_trains_other_weights(key: str, outcome: Outcome, folder: Path) -> None:
    value, beside = SETS[key]

    def sets(**more: object) -> str:
        second = {**beside, **more, "images": str(folder.parent / str(beside.get("images", "images")))}
        return f"data.sets={toml([{'images': str(folder.parent / 'others')}, second])}"

    assert outcome(sets(**{key: value})) != outcome(sets())


@pytest.mark.parametrize("setting", TEXTS)
def test_another_value_writes_other_metadata(setting: str) -> None:
    needed = ["data.images=x", "data.trigger=zorb", "output.path=x.safetensors"]
    one, other = (load_config(None, [*needed, *more]) for more in ([], [f"{setting}={TEXTS[setting]}"]))
    assert training_metadata(one, *facts()) != training_metadata(other, *facts())


@pytest.mark.parametrize("setting", FILES)
def test_another_value_writes_another_file(setting: str, tiny_base: Path, folder: Path, tmp_path: Path) -> None:
    def payload(name: str, *more: str) -> bytes:
        file = tmp_path / f"{name}.safetensors"
        images = (
            f"data.images={folder / 'more'}",
            "data.trigger=zorb",
            f"base.path={tiny_base}",
            f"output.path={file}",
        )
        package.train(load_config(None, [*images, "train.steps=2", "samples.prompts=[]", *more]))
        return file.read_bytes()[read_header(file, SdloraError).payload_start :]

    assert payload("other", f"{setting}={FILES[setting]}") != payload("one")
