"""What goes beside a LoRA for people and for A1111: a model card in Markdown, and the webui's card in JSON."""

from __future__ import annotations

from collections.abc import Sequence

from ..families import Family
from ..formats.hashes import FileHashes
from ..formats.lora_file import LoraFile

_UPLOAD_NAMES = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL 1.0"}
"""Family -> what Civitai's form calls it."""


def sidecar(
    file: LoraFile, family: Family, trigger: Sequence[str], weight: float, negative: str
) -> dict[str, str | float]:
    """The card that A1111 and Forge keep beside a LoRA, by which it can be called with one click."""
    notes = [file.metadata.get("modelspec.usage_hint", ""), f"Made by {file.metadata.get('modelspec.author', '')}"]
    return {
        "description": file.metadata.get("modelspec.description", ""),
        "sd version": family.name.upper(),
        "activation text": ", ".join(trigger),
        "preferred weight": weight,
        "negative text": negative,
        "notes": "\n".join(note for note in notes if note not in ("", "Made by ")),
    }


def model_card(
    name: str,
    file: LoraFile,
    family: Family,
    trigger: Sequence[str],
    weight: float,
    hashes: FileHashes,
    prompts: Sequence[str],
) -> str:
    told = {key: value for key, value in file.metadata.items() if value not in ("", "None")}
    title = told.get("modelspec.title", name)
    call = ", ".join(trigger)
    facts = {
        "Base model": f"{_UPLOAD_NAMES[family.name]} ({family.title})",
        "Trained on": told.get("ss_sd_model_name"),
        "Trigger words": f"`{call}`" if call else None,
        "Recommended weight": f"{weight:g}",
        "Prediction": told.get("modelspec.prediction_type"),
        "License": told.get("modelspec.license", "to be chosen"),
        "Author": told.get("modelspec.author"),
        "Tags": told.get("modelspec.tags"),
    }
    training = {
        "Images": told.get("ss_num_train_images"),
        "Steps": told.get("ss_steps") or told.get("ss_max_train_steps"),
        "Batch size": told.get("ss_total_batch_size"),
        "Resolution": told.get("modelspec.resolution"),
        "Rank / alpha": _pair(told.get("ss_network_dim"), told.get("ss_network_alpha")),
        "Learning rate (UNet / text encoder)": _pair(
            told.get("ss_unet_lr") or told.get("ss_learning_rate"), told.get("ss_text_encoder_lr")
        ),
        "Schedule": told.get("ss_lr_scheduler"),
        "Clip skip": told.get("ss_clip_skip"),
        "Modules": f"{len(file.modules)} ({', '.join(f'{kind} {count}' for kind, count in file.kinds.items())})",
    }
    prompt = f"{prompts[0] if prompts else call}".strip()
    return f"""# {title}

{told.get("modelspec.description", "_What it draws, and what it was made from._")}

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


def _pair(first: str | None, second: str | None) -> str | None:
    return first and f"{first} / {second or 'not trained'}"


def _table(rows: dict[str, str | None]) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])
