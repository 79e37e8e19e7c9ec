"""What accompanies an uploaded LoRA: a model card in Markdown for people, and A1111's card in JSON."""

from __future__ import annotations

from dataclasses import dataclass

from ..families import Family
from ..formats.hashes import FileHashes
from ..formats.keys import resolve
from ..formats.lora_file import LoraFile
from ..formats.published import published_modules


@dataclass(frozen=True, kw_only=True)
class Presentation:
    """What an upload says about its LoRA besides its metadata."""

    name: str
    """The name in prompts: ``<lora:name:1>``."""
    family: Family
    trigger: tuple[str, ...]
    weight: float
    """LoRA weight for the previews, and recommended to users."""
    negative: str
    prompts: tuple[str, ...]
    """One for each preview."""


def sidecar(file: LoraFile, shown: Presentation) -> dict[str, str | float]:
    """The card that A1111 and Forge keep beside a LoRA, which puts it into a prompt with one click."""
    author = file.metadata.get("modelspec.author")
    notes = (file.metadata.get("modelspec.usage_hint"), author and f"Made by {author}")
    return {
        "description": file.metadata.get("modelspec.description", ""),
        "sd version": shown.family.name.upper(),
        "activation text": ", ".join(shown.trigger),
        "preferred weight": shown.weight,
        "negative text": shown.negative,
        "notes": "\n".join(note for note in notes if note),
    }


def model_card(file: LoraFile, shown: Presentation, hashes: FileHashes) -> str:
    """A page in Markdown: what the LoRA is, how to use it, how it was trained, its hashes. ``file`` is the one uploaded."""
    stated = {key: value for key, value in file.metadata.items() if value not in ("", "None")}
    title = stated.get("modelspec.title", shown.name)
    name, weight, call = shown.name, shown.weight, ", ".join(shown.trigger)
    facts = {
        "Base model": _base_model(file, shown.family),
        "Trained on": stated.get("ss_sd_model_name"),
        "Trigger words": f"`{call}`" if call else None,
        "Recommended weight": f"{weight:g}",
        "Prediction": stated.get("modelspec.prediction_type"),
        "License": stated.get("modelspec.license", "to be chosen"),
        "Author": stated.get("modelspec.author"),
        "Tags": stated.get("modelspec.tags"),
    }
    training = {
        "Images": stated.get("ss_num_train_images"),
        "Steps": stated.get("ss_steps") or stated.get("ss_max_train_steps"),
        "Batch size": stated.get("ss_total_batch_size"),
        "Resolution": stated.get("modelspec.resolution"),
        "Rank / alpha": _pair(stated.get("ss_network_dim"), stated.get("ss_network_alpha")),
        "Learning rate (UNet / text encoder)": _pair(
            stated.get("ss_unet_lr") or stated.get("ss_learning_rate"), stated.get("ss_text_encoder_lr")
        ),
        "Schedule": stated.get("ss_lr_scheduler"),
        "Clip skip": stated.get("ss_clip_skip"),
        "Modules": f"{len(file.modules)} ({', '.join(f'{kind} {count}' for kind, count in file.kinds.items())})",
    }
    prompt = f"{shown.prompts[0] if shown.prompts else call}".strip()
    return f"""# {title}

{stated.get("modelspec.description", "_What it draws, and what it was made from._")}

{_table(facts)}

## Use

In A1111 and Forge: `{prompt} <lora:{name}:{weight:g}>`. In ComfyUI: *Load LoRA* with strength {weight:g}, and
`{call}` in the prompt. In diffusers:

```python
pipeline.load_lora_weights(".", weight_name="{name}.safetensors")
pipeline("{prompt}", cross_attention_kwargs={{"scale": {weight:g}}})
```

## Training

{_table(training)}

## Hashes

{_table({"SHA-256": hashes.sha256, "AutoV1": hashes.autov1, "AutoV2": hashes.autov2, "AutoV3": hashes.autov3})}
"""


def fits_published(file: LoraFile, family: Family) -> bool:
    """Whether every module of a LoRA that the published checkpoints of ``family`` have fits them by its shape."""
    shapes = published_modules(family.name)
    matched = resolve(file.modules, shapes).matched
    return bool(matched) and all(file.modules[key].fits(shapes[name]) for key, name in matched.items())


def unpublished(file: LoraFile, family: Family) -> str | None:
    """Why nobody else can use the LoRA, where it fits no published checkpoint of its family; else None."""
    if fits_published(file, family):
        return None
    base = file.metadata.get("ss_sd_model_name", "")
    made = "on mini, a base that only sdlora has" if base == "mini" else f"on a base of other shapes {base}".rstrip()
    return (
        f"it was made {made}, and does not fit {family.upload_name} or any other published {family.title} checkpoint: "
        "users of Civitai cannot use it"
    )


def _base_model(file: LoraFile, family: Family) -> str:
    reason = unpublished(file, family)
    return f"none that is published: {reason}" if reason else f"{family.upload_name} ({family.title})"


def _pair(first: str | None, second: str | None) -> str | None:
    return first and f"{first} / {second or 'not trained'}"


def _table(rows: dict[str, str | None]) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])
