"""Options of kohya's trainer (``train_network.py`` of sd-scripts), for an answer by name when one of them is used here."""

from __future__ import annotations

ELSEWHERE = {
    "reg_data_dir": 'role = "regularisation" in [[data.sets]]',
    "caption_extention": "data.caption_extension",
    "dataset_repeats": "repeats in [[data.sets]]",
    "masked_loss": "data.mask",
    "debiased_estimation_loss": 'objective.weighting = "debiased"',
    "sdpa": "base.attention",
    "mem_eff_attn": "base.attention",
    "fp8_base": "base.quantization",
    "fp8_base_unet": "base.quantization",
    "unet_lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "network_args": "lora.targets, lora.rules or optimizer.lora_plus_ratio",
    "network_train_unet_only": "optimizer.text_encoder_learning_rate = 0",
    "network_train_text_encoder_only": "optimizer.learning_rate = 0",
    "full_bf16": "train.precision",
    "output_dir": "output.path",
    "save_state": "train.save_every",
    "metadata_trigger_phrase": "data.trigger",
}
"""Options that mean the same as a setting of another name; the settings themselves name the other options."""

ABBREVIATIONS = {
    "lr": "optimizer.learning_rate",
    "te_lr": "optimizer.text_encoder_learning_rate",
    "dim": "lora.rank",
    "bs": "train.batch_size",
}
"""Names that people use for a setting, and no program does."""

UNNECESSARY = {
    "v2": "the family is detected from the checkpoint",
    "cache_latents": "images are always encoded only once",
    "cache_text_encoder_outputs": "captions are encoded only once where the text encoder is not trained",
    "cache_text_encoder_outputs_to_disk": "cache.disk keeps captions too",
    "skip_cache_check": "the cache is found by content and needs no check",
    "cache_info": "image files are always read",
    "save_n_epoch_ratio": "give the steps between LoRA files as output.save_every",
    "save_last_n_epochs": "give the number of LoRA files to keep as output.keep",
    "save_last_n_steps": "give the number of LoRA files to keep as output.keep",
    "resume": "run the same command to resume",
    "initial_epoch": "run the same command to resume",
    "initial_step": "run the same command to resume",
    "skip_until_initial_step": "run the same command to resume",
    "network_module": "lora.kind and lora.targets say what is trained",
    "save_model_as": "the file is always .safetensors",
    "use_safetensors": "the file is always .safetensors",
    "max_data_loader_n_workers": "there are no worker processes",
    "persistent_data_loader_workers": "there are no worker processes",
    "vae_batch_size": "images are encoded as memory allows",
    "no_half_vae": "the VAE runs in the precision that it needs",
    "fp16_master_weights_and_gradients": "the LoRA is always trained in float32",
    "debug_dataset": "sdlora lint shows the dataset",
    "config_file": "give the file as the first argument of sdlora train",
    "output_config": "sdlora settings lists all settings",
}
"""Options without a setting here, and why none is needed."""

NOT_SUPPORTED = frozenset({
    "adaptive_noise_scale", "async_upload", "base_weights", "base_weights_multiplier", "blocks_to_swap",
    "caption_dropout_every_n_epochs", "caption_separator", "color_aug", "console_log_file", "console_log_level",
    "console_log_simple", "cpu_offload_checkpointing", "custom_attributes", "dataset_class",
    "ddp_gradient_as_bucket_view", "ddp_static_graph", "ddp_timeout", "deepspeed",
    "dim_from_weights", "disable_mmap_load_safetensors", "dynamo_backend", "face_crop_aug_range",
    "full_fp16", "fused_backward_pass", "gradient_accumulation_steps", "highvram",
    "huber_scale", "huggingface_path_in_repo", "huggingface_repo_id", "huggingface_repo_type",
    "huggingface_repo_visibility", "huggingface_token", "ip_noise_gamma_random_strength",
    "keep_tokens_separator", "log_config", "log_prefix", "log_tracker_config", "log_tracker_name",
    "lowram", "lr_decay_steps", "lr_scheduler_args",
    "lr_scheduler_min_lr_ratio", "lr_scheduler_timescale",
    "max_validation_steps", "metadata_is_negative_embedding", "metadata_merged_from",
    "metadata_preprocessor", "mode_scale",
    "noise_offset_random_strength", "offload_optimizer_device",
    "offload_optimizer_nvme_path", "offload_param_device", "offload_param_nvme_path", "resize_interpolation",
    "resume_from_huggingface", "save_last_n_epochs_state",
    "save_last_n_steps_state", "save_state_to_huggingface",
    "scale_v_pred_loss_like_noise_pred", "secondary_separator", "skip_image_resolution",
    "text_encoder_batch_size", "token_warmup_min", "token_warmup_step", "tokenizer_cache_dir",
    "use_8bit_adam", "use_lion_optimizer", "v_pred_like_loss", "validate_every_n_epochs",
    "validation_seed", "validation_split", "wandb_api_key", "wandb_run_name", "weighted_captions", "weighting_scheme",
    "zero3_init_flag", "zero3_save_16bit_model", "zero_stage",
})  # fmt: skip
"""Options that nothing here corresponds to."""
