"""What kohya_ss, the window over kohya's trainer, saves as JSON: the options that it would start the trainer with.

The file has every field of the window, also those of other models and other kinds of LoRA. What follows is read from
``kohya_gui/lora_gui.py`` of kohya_ss (``train_model``).
"""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError

_NAMES = {
    "optimizer": "optimizer_type",
    "max_resolution": "resolution",
    "epoch": "max_train_epochs",
    "LoRA_type": "network_module",
    "lr_warmup": "lr_warmup_percent",
    "xformers_attention": "xformers",
    "caption_ext": "caption_extension",
    "lora_network_weights": "network_weights",
}
"""Field -> option of the trainer, where they differ."""

_WINDOW_ALONE = frozenset({
    "additional_parameters", "block_lr_zero_threshold", "conv_alphas", "conv_dims", "dynamo_mode",
    "dynamo_use_dynamic", "dynamo_use_fullgraph", "extra_accelerate_launch_args", "file_path", "folders", "gpu_ids",
    "lowvram", "main_process_port", "model_list", "multi_gpu", "noise_offset_type", "num_cpu_threads_per_process",
    "num_machines", "num_processes", "save_as_bool", "sdxl", "sdxl_cache_text_encoder_outputs", "sdxl_no_half_vae",
    "v2",
    # kohya_ss says "not yet supported. Ignoring".
    "stop_text_encoder_training", "stop_text_encoder_training_pct",
})  # fmt: skip
"""Fields that change nothing of a LoRA."""

_OTHER_KINDS = frozenset({
    "LyCORIS_preset", "bypass_mode", "constrain", "decompose_both", "dora_wd", "factor", "rank_dropout_scale",
    "rescaled", "train_norm", "train_on_input", "unit", "use_cp", "use_scalar", "use_tucker",
})  # fmt: skip
"""Fields of kinds of LoRA that networks.lora does not have."""

_OTHER_MODELS = frozenset({
    "ae", "apply_t5_attn_mask", "blocks_to_swap", "clip_g", "clip_g_dropout_rate", "clip_l",
    "cpu_offload_checkpointing", "discrete_flow_shift", "double_blocks_to_swap", "enable_all_linear", "ggpo_beta",
    "ggpo_sigma", "guidance_scale", "img_attn_dim", "img_mlp_dim", "img_mod_dim", "in_dims", "logit_mean", "logit_std",
    "mem_eff_save", "mode_scale", "model_prediction_type", "model_type", "no_token_padding",
    "pos_emb_random_crop_rate", "save_clip", "save_t5xxl", "show_timesteps", "show_timesteps_resolution",
    "single_blocks_to_swap", "single_dim", "single_mod_dim", "split_mode", "split_qkv", "t5xxl", "t5xxl_device",
    "t5xxl_dtype", "t5xxl_lr", "t5xxl_max_token_length", "timestep_sampling", "train_blocks",
    "train_double_block_indices", "train_lora_ggpo", "train_single_block_indices", "train_t5xxl", "txt_attn_dim",
    "txt_mlp_dim", "txt_mod_dim", "weighting_scheme",
})  # fmt: skip
_OTHER_PREFIXES = ("anima_", "flux1_", "hunyuan_", "lumina_", "sd3_")
"""Fields of models that are not Stable Diffusion 1.x, 2.x or XL: these, and all that start so."""
_MODEL_BOXES = ("anima_checkbox", "flux1_checkbox", "hunyuan_image_checkbox", "lumina_checkbox", "sd3_checkbox")

_NOISE_FIELDS = {
    "Original": ("multires_noise_discount", "multires_noise_iterations"),
    "Multires": ("adaptive_noise_scale", "noise_offset", "noise_offset_random_strength"),
}
"""Value of ``noise_offset_type`` -> the fields that it leaves out."""
_RATES = ("text_encoder_lr", "unet_lr")


def saved_options(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Option of kohya's trainer -> value, of the ``fields`` that kohya_ss saved.

    Raises:
        ConfigError: they are for another model; ``where`` begins the message.
    """
    for box in _MODEL_BOXES:
        if fields.get(box):
            raise ConfigError(f"{where}: {box} is set; only Stable Diffusion 1.x, 2.x and XL can be trained")
    unused = _unused(fields)
    options = {
        _NAMES.get(name, name): value
        for name, value in fields.items()
        if name not in unused and not name.startswith(_OTHER_PREFIXES)
    }
    if options.get("xformers") in ("sdpa", "none"):
        # The field has the name of an attention; in older files it is true or false.
        options["sdpa"] = options.pop("xformers") == "sdpa"
    for name in ("optimizer_args", "lr_scheduler_args"):
        if isinstance(options.get(name), str):
            options[name] = options[name].replace('"', "").split()
    if fields.get("lr_scheduler_num_cycles") == "" and not _is_zero(fields.get("epoch")):
        options["lr_scheduler_num_cycles"] = fields["epoch"]
    return options


def _unused(fields: dict[str, Any]) -> set[str]:
    unused = set(_WINDOW_ALONE | _OTHER_KINDS | _OTHER_MODELS)
    if fields.get("LoRA_type", "Standard") == "Standard":
        unused |= {"conv_dim", "conv_alpha"}
    unused |= set(_NOISE_FIELDS.get(str(fields.get("noise_offset_type")), ()))
    if not _is_zero(fields.get("max_train_steps")) or not _is_zero(fields.get("max_train_epochs")):
        unused.add("epoch")
    # A rate of 0 does not train that part, unless both are 0; every other number 0 means that it is not stated.
    stated = {name for name in _RATES if not _is_zero(fields.get(name))}
    unused |= {name for name, value in fields.items() if _is_zero(value) and name not in (*_RATES, "learning_rate")}
    return unused if stated else unused | set(_RATES)


def _is_zero(value: Any) -> bool:
    """Whether ``value`` is 0 or nothing, as a number or as text."""
    if value is None or value == "":
        return True
    if isinstance(value, bool):
        return False
    try:
        return float(value) == 0
    except (TypeError, ValueError):
        return False
