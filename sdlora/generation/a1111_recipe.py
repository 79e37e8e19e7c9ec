"""What A1111's and Forge's parameters of an image mean here: the sampler and its schedule, and what cannot be repeated."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .samplers import SAMPLERS, read_sampler
from .schedules import SCHEDULE_NAMES, plain

_AUTOMATIC: Mapping[str, str] = {
    **dict.fromkeys(("dpm++2m", "dpm++sde", "dpm++2s-a", "dpm2", "dpm2-a"), "karras"),
    **dict.fromkeys(("dpm++2m-sde", "dpm++3m-sde"), "exponential"),
    **dict.fromkeys(("euler", "euler-a", "heun", "lms"), "uniform"),
}
"""Sampler -> the schedule that A1111 1.9 and later take where "Automatic" is chosen (modules/sd_samplers_kdiffusion.py)."""
_NEAREST: Mapping[str, str] = {
    "dpmpp2msdeheun": "dpm++2m-sde",
    "dpmfast": "dpm++2m",
    "dpmadaptive": "dpm++2m",
    "restart": "heun",
    "plms": "ddim",
    "ddimcfgpp": "ddim",
    "heunpp2": "heun",
    "ipndm": "lms",
    "deis": "dpm++2m",
    "ddpm": "euler-a",
}
"""Plain names of samplers that are missing here -> the nearest one."""
_SHORTENED = ("dpm2", "dpm2-a", "dpm++3m-sde")
"""Samplers for which A1111 leaves out the last but one noise level."""
_OTHER_ENDS: Mapping[str, str] = {
    "align-your-steps": "A1111's Align Your Steps has its last step at the lowest noise level; here it ends as published",
    "kl-optimal": "A1111's KL Optimal ends at the lowest noise level; here the last step ends at 0",
}
"""Schedule -> in what its noise levels differ from those of A1111 (modules/sd_schedulers.py)."""
_HARMLESS = {
    *("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model", "Version", "Hashes"),
    *(
        "Lora hashes",
        "TI hashes",
        "Clip skip",
        "RNG",
        "User",
        "Batch size",
        "Batch pos",
        "Civitai resources",
        "Civitai metadata",
    ),
    *("Created Date", "CFG Rescale", "CFG Rescale φ", "Timestep spacing", "Hires upscale", "Hires steps"),
    *("Hires upscaler", "Denoising strength", "Init image hash", "Mask blur", "Hires resize", "First pass size"),
    *("Script", "Template", "Negative Template", "Wildcard prompt", "Wildcard negative prompt", "Size-1", "Size-2"),
}
"""Fields that are read, or that change no pixel."""


def a1111_sampler(fields: Mapping[str, str]) -> tuple[str, str | None, list[str]]:
    """Sampler and schedule of a recipe of A1111 or Forge, and a line for each respect in which they differ.

    Until A1111 1.8 a sampler's name contains the schedule, and a name without one means its Uniform; from 1.9 on there is a
    field, in which "Automatic" depends on the sampler.
    """
    written, stated = fields.get("Sampler", "Euler"), fields.get("Schedule type")
    notes: list[str] = []
    automatic = stated is not None and plain(stated) == "automatic"
    known = None if stated is None or automatic else SCHEDULE_NAMES.get(plain(stated))
    sampler, named = read_sampler(written)
    if sampler not in SAMPLERS:
        nearest = next((name for short, name in _NEAREST.items() if plain(written).startswith(short)), "dpm++2m")
        notes.append(f"Sampler: {written} is not available here; {nearest} is taken")
        ending = next((name for end, name in SCHEDULE_NAMES.items() if plain(written).endswith(end)), None)
        sampler, named = nearest, ending
    if stated is not None and not automatic and known is None:
        notes.append(f"Schedule type: {stated} is not available here; that of A1111's Automatic is taken")
        automatic = True
    schedule = named or known or (_AUTOMATIC.get(sampler) if automatic else None)
    if schedule is None and sampler in _AUTOMATIC:
        schedule = "uniform"
    if schedule is not None and schedule not in SAMPLERS[sampler].schedules:
        if sampler not in ("ddim", "unipc") and stated is not None:
            notes.append(f"Schedule type: {sampler} has its own here; {stated} is left out")
        schedule = None
    if sampler == "unipc":
        schedule = None
    if schedule is not None and schedule in _OTHER_ENDS:
        notes.append(f"Schedule type: {_OTHER_ENDS[schedule]}")
    if sampler in _SHORTENED:
        notes.append(f"Sampler: A1111 leaves out the last but one noise level of {written}; here it is taken")
    return sampler, schedule, notes


def a1111_differences(fields: Mapping[str, str], sampler: str) -> list[str]:
    """One line for each respect in which an image of A1111 or Forge cannot be repeated, besides sampler and schedule."""
    notes = []
    source = fields.get("RNG", "GPU")
    if source != "CPU":
        notes.append(
            f"RNG: the noise was drawn on the {source}; here it is drawn on the CPU, so the seed means another image"
        )
    elif sampler in ("dpm++sde", "dpm++2m-sde", "dpm++3m-sde", "lcm"):
        notes.append(f"Sampler: A1111 draws the new noise of {fields.get('Sampler')} differently")
    if sampler in ("dpm++2m", "unipc"):
        notes.append(f"Sampler: the timesteps of {sampler} are rounded here, as in diffusers")
    left_out = {key: value for key, value in fields.items() if key not in _HARMLESS}
    left_out |= {key: fields[key] for key in ("First pass size",) if key in fields}
    return [*notes, *(f"{key}: {value} is left out" for key, value in left_out.items() if not _is_default(key, value))]


def _is_default(key: str, value: str) -> bool:
    """Whether a field says what holds here anyway."""
    return (key, value) in {
        ("Eta", "1.0"),
        ("Eta", "1"),
        ("ENSD", "0"),
        ("Face restoration", "False"),
        ("Tiling", "False"),
        ("Variation seed strength", "0"),
        ("Hires sampler", "Use same sampler"),
        ("Hires prompt", ""),
        ("Hires negative prompt", ""),
        ("Emphasis", "Original"),
        ("FP8 weight", "Disable"),
    } or (key == "Variation seed" and not re.search(r"\d", value))
