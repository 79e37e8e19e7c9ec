"""Files and names against the reference reader, hand-written keys and damaged bytes."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from sdlora.config.loading import load_config
from sdlora.config.sections import Config
from sdlora.errors import LoraFileError
from sdlora.families import FAMILIES, SD1, SDXL
from sdlora.formats.hashes import FileHashes, hash_file
from sdlora.formats.keys import kohya_keys, part_of, resolve
from sdlora.formats.lora_file import read_lora
from sdlora.formats.lora_tensors import build_change
from sdlora.formats.lora_writer import write_lora
from sdlora.formats.metadata import safe_title, trigger_words
from sdlora.formats.peft_settings import Scale
from sdlora.formats.safetensors_file import read_header, serialise
from sdlora.lora.low_rank import LowRank
from sdlora.training.metadata import DatasetFacts, FolderFacts, RunFacts, tag_frequency, training_metadata

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT = "text_encoder.text_model.encoder.layers.11.self_attn.q_proj"


def low_rank(rank: int = 2, wide: int = 6, high: int = 4, alpha: float = 1.0) -> LowRank:
    return LowRank(down=torch.randn(rank, wide), up=torch.randn(high, rank), alpha=alpha)


def test_kohya_names_are_those_of_kohya() -> None:
    assert kohya_keys([UNET, TEXT], SD1, ()) == {
        UNET: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
        TEXT: "lora_te_text_model_encoder_layers_11_self_attn_q_proj",
    }
    assert kohya_keys([TEXT], SDXL, ()) == {TEXT: "lora_te1_text_model_encoder_layers_11_self_attn_q_proj"}
    with pytest.raises(ValueError, match="is not a module of the base"):
        kohya_keys([UNET], SDXL, [UNET.replace("down_blocks.0", "down_blocks.1")])


def test_sdxl_names_are_sgm_s_at_full_size() -> None:
    from tests.published import our_names, published

    tensors = our_names("unet", published("sdxl")["unet"])
    modules = {f"unet.{name.removesuffix('.weight')}" for name in tensors if name.endswith(".weight")}
    attention = {name for name in modules if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))}
    keys = kohya_keys(attention, SDXL, modules)
    assert len(set(keys.values())) == 560
    down, mid, up = ("unet.down_blocks.1.attentions.0", "unet.mid_block.attentions.0", "unet.up_blocks.0.attentions.0")
    block = ".transformer_blocks.0.attn1.to_q"
    assert [keys[place + block] for place in (down, mid, up)] == [
        f"lora_unet_{place}_transformer_blocks_0_attn1_to_q"
        for place in ("input_blocks_4_1", "middle_block_1", "output_blocks_0_1")
    ]
    assert resolve(keys.values(), modules).matched == {key: name for name, key in keys.items()}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0", UNET),
        (UNET, UNET),
        ("lora_te_text_model_encoder_layers_11_self_attn_q_proj", TEXT),
        ("lora_te1_text_model_encoder_layers_11_self_attn_q_proj", TEXT),
        ("lora_te_encoder_layers_11_self_attn_q_proj", TEXT),
        ("text_encoder.encoder.layers.11.self_attn.q_proj", TEXT),
        (TEXT, TEXT),
    ],
)
def test_every_spelling_finds_its_module(key: str, name: str) -> None:
    found = resolve([key, "lora_unet_nowhere"], [UNET, TEXT])
    assert found.matched == {key: name}
    assert found.unmatched == ("lora_unet_nowhere",)
    assert part_of(key) == name.partition(".")[0]


def test_ambiguous_names_are_refused() -> None:
    with pytest.raises(ValueError, match="both spelled"):
        resolve([], ["unet.a.b", "unet.a_b"])


@given(st.lists(st.sampled_from([UNET, TEXT, UNET.replace("attn1", "attn2")]), unique=True, min_size=1), st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_writing_and_reading_gives_the_same_modules(tmp_path: Path, names: list[str], data: st.DataObject) -> None:
    ranks = {name: data.draw(st.integers(1, 5)) for name in names}
    modules = {name: low_rank(rank=ranks[name], alpha=float(data.draw(st.integers(1, 64)))) for name in names}
    write_lora(tmp_path / "x.safetensors", modules, {"ss_seed": "1"}, dtype=torch.float32)
    file = read_lora(tmp_path / "x.safetensors")
    found = resolve(file.modules, [UNET, TEXT, UNET.replace("attn1", "attn2")])
    assert set(found.matched.values()) == set(names)
    for key, name in found.matched.items():
        assert torch.equal(file.modules[key].down, modules[name].down)
        assert torch.equal(file.modules[key].up, modules[name].up)
        assert file.modules[key].alpha == modules[name].alpha
    assert not file.problems


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_reference_reader_reads_what_we_write(tmp_path: Path, dtype: torch.dtype) -> None:
    file, change = tmp_path / "x.safetensors", low_rank(alpha=8.0)
    write_lora(file, {UNET: change}, {"modelspec.title": "Ünicode"}, dtype=dtype)
    key = kohya_keys([UNET], SD1, ())[UNET]
    with safe_open(file, framework="pt") as reader:
        assert sorted(reader.keys()) == [f"{key}.alpha", f"{key}.lora_down.weight", f"{key}.lora_up.weight"]
        assert torch.equal(reader.get_tensor(f"{key}.lora_down.weight"), change.down.to(dtype))
        alpha = reader.get_tensor(f"{key}.alpha")
        assert (alpha.shape, alpha.dtype, float(alpha)) == (torch.Size([]), dtype, 8.0)
        assert reader.metadata()["modelspec.title"] == "Ünicode"


def test_bytes_are_the_same_every_time_and_hashes_are_of_the_final_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    modules = {UNET: low_rank(), TEXT: low_rank()}
    for name in ("a", "b"):
        write_lora(tmp_path / name, dict(reversed(modules.items())), {"b": "2", "a": "1"}, dtype=torch.float16)
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    payload = hashlib.sha256(data[8 + length :]).hexdigest()
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert metadata["sshs_model_hash"] == payload
    assert metadata["modelspec.hash_sha256"] == f"0x{payload}"
    hashes = hash_file(tmp_path / "a", 8 + length)
    assert (hashes.sha256, hashes.payload_sha256) == (hashlib.sha256(data).hexdigest(), payload)
    assert hashes.autov3 == payload[:12]
    assert hashes.autov1 == "e3b0c442"


def test_legacy_hashes_of_a_file_over_a_megabyte(tmp_path: Path) -> None:
    data = torch.arange(2_000_000, dtype=torch.int64).to(torch.uint8).numpy().tobytes()
    (tmp_path / "x").write_bytes(data)
    expected = hashlib.sha256(data[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert hash_file(tmp_path / "x", 0).autov1 == expected


@pytest.mark.parametrize(
    ("names", "format"),
    [
        ((f"{UNET}.lora_A.weight", f"{UNET}.lora_B.weight"), "peft"),
        ((f"{UNET}.lora.down.weight", f"{UNET}.lora.up.weight"), "diffusers"),
        ((f"base_model.model.{UNET}.lora_A.weight", f"base_model.model.{UNET}.lora_B.weight"), "peft"),
        ((f"{TEXT}.lora_linear_layer.down.weight", f"{TEXT}.lora_linear_layer.up.weight"), "diffusers"),
    ],
)
def test_files_without_alpha_have_scale_one(tmp_path: Path, names: tuple[str, str], format: str) -> None:
    save_file({names[0]: torch.randn(4, 6), names[1]: torch.randn(5, 4)}, tmp_path / "x.safetensors")
    file = read_lora(tmp_path / "x.safetensors")
    assert file.format == format
    assert [module.scale for module in file.modules.values()] == [1.0]
    assert resolve(file.modules, [UNET, TEXT]).unmatched == ()


def test_what_cannot_be_used_is_listed(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_a.lora_down.weight": torch.randn(2, 3),
        "lora_unet_a.lora_up.weight": torch.randn(3, 2),
        "lora_unet_b.lora_down.weight": torch.randn(2, 3),
        "lora_unet_c.hada_w1_a": torch.randn(2, 3),
        "lora_unet_d.lora_down.weight": torch.full((2, 3), torch.nan),
        "lora_unet_d.lora_up.weight": torch.randn(3, 2),
        "lora_unet_e.lora_down.weight": torch.randn(2, 3),
        "lora_unet_e.lora_up.weight": torch.randn(3, 4),
        "lora_unet_f.alpha": torch.tensor(1.0),
        "lora_unet_g.set_weight": torch.randn(2, 3),
        "lora_unet_h.reshape_weight": torch.tensor([4, 6]),
        "lora_unet_h.lora_down.weight": torch.randn(2, 3),
        "lora_unet_h.lora_up.weight": torch.randn(3, 2),
        **{f"lora_unet_i.{name}.weight": torch.randn(3) for name in ("a1", "a2", "b1", "b2")},
        "lora_unet_j.something": torch.randn(3),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    file = read_lora(tmp_path / "x.safetensors")
    assert list(file.modules) == ["lora_unet_a"]
    text = "\n".join(file.problems)
    assert len(file.problems) == 9
    for part in (
        "lora_unet_b has no up",
        "lora_unet_c has no hada_w1_b",
        "lora_unet_d holds NaN",
        "do not multiply",
        "lora_unet_f",
        "lora_unet_g puts another weight",
        "lora_unet_h is for a weight of another shape",
        "lora_unet_i has GLoRA matrices with fewer than two axes",
        "tensor lora_unet_j.something is of a kind that cannot be applied",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("shapes", "fault"),
    [
        ({"hada_w1_a": (6, 2), "hada_w1_b": (3, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}, "do not multiply"),
        ({"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (5, 2), "hada_w2_b": (2, 8)}, "different shapes"),
        (
            {"hada_w1_a": (2, 6), "hada_w1_b": (2, 8), "hada_w2_a": (2, 6), "hada_w2_b": (2, 8)}
            | {"hada_t1": (2, 2, 3, 3), "hada_t2": (2, 4, 3, 3)},
            "a core and matrices that do not multiply",
        ),
        ({"lokr_w1": (2, 4), "lokr_w2_a": (3, 1), "lokr_w2_b": (2, 2)}, "do not multiply"),
        ({"lokr_w1": (2, 4), "lokr_w2_a": (1, 3), "lokr_w2_b": (1, 2), "lokr_t2": (2, 1, 3, 3)}, "do not multiply"),
        ({"a1.weight": (8, 2), "a2.weight": (3, 8), "b1.weight": (6, 2), "b2.weight": (2, 8)}, "do not multiply"),
    ],
)
def test_matrices_that_do_not_multiply_are_reported_for_every_kind(
    shapes: dict[str, tuple[int, ...]], fault: str, tmp_path: Path
) -> None:
    save_file({f"lora_unet_x.{name}": torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(
        LoraFileError, match=f"none of its 1 modules can be used; for example lora_unet_x has .*{fault}"
    ):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize("padding", range(8))
def test_tensors_may_begin_at_any_byte(padding: int, tmp_path: Path) -> None:
    """Not every writer pads its header."""
    down, up = torch.randn(3, 5), torch.randn(4, 3)
    header, payload = serialise({"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up}, {})
    text = header[8:].rstrip() + b" " * padding
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + payload)
    tensors = read_lora(tmp_path / "x.safetensors").modules["lora_unet_a"].tensors()
    assert torch.equal(tensors["lora_down.weight"], down)
    assert torch.equal(tensors["lora_up.weight"], up)
    tensors["lora_up.weight"].zero_()
    assert (tmp_path / "x.safetensors").read_bytes().endswith(payload)


@given(
    values=st.lists(st.floats(width=16), min_size=1, max_size=6),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]),
)
def test_finite_tensors_are_those_that_torch_finds_finite(values: list[float], dtype: str) -> None:
    tensor = torch.tensor(values).to(getattr(torch, dtype))
    change = {"diff": tensor[None]}
    if tensor.float().isfinite().all():
        assert build_change(change, scale=Scale()).kind == "full"
    else:
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            build_change(change, scale=Scale())


@given(damage=st.binary(min_size=0, max_size=400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_bytes_give_one_error_line(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(damage)
    with pytest.raises(LoraFileError) as caught:
        read_lora(tmp_path / "x.safetensors")
    assert len(caught.value.problems) == 1


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_a_damaged_header_is_an_error_or_still_a_file(tmp_path: Path, data: st.DataObject) -> None:
    header, payload = serialise({"lora_unet_a.lora_down.weight": torch.ones(2, 3)}, {"a": "b"})
    whole = bytearray(header + payload)
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.safetensors").write_bytes(bytes(whole))
    try:
        found = read_header(tmp_path / "x.safetensors", LoraFileError)
    except LoraFileError as error:
        assert len(error.problems) == 1
        return
    assert len(found.tensors) == 1


def test_truncation_is_reported_in_bytes(tmp_path: Path) -> None:
    header, payload = serialise({"lora_unet_a.lora_down.weight": torch.ones(2, 3)}, {})
    (tmp_path / "x").write_bytes(header + payload[:-5])
    with pytest.raises(LoraFileError, match="truncated or damaged: 5 bytes are missing"):
        read_header(tmp_path / "x", LoraFileError)


def facts(**changes: object) -> tuple[RunFacts, DatasetFacts]:
    run = RunFacts(
        title="x", base_name="b.safetensors", family=SD1, vae_name=None, vae_hashes=None,
        base_hashes=FileHashes(sha256="0" * 64, autov1="12345678", payload_sha256="1" * 64),
        prediction="epsilon", resolution=128, modules=92, rank=16, alpha=8.0, step=25, epoch=3, epochs=3,
        warmup_steps=20,
        batches_per_epoch=9, precision="bfloat16", session=5, started_at=1.0, finished_at=100.0, clip_skip=None,
        token_length=75, zero_terminal_snr=False,
    )  # fmt: skip
    folder = FolderFacts(name="pics", repeats=3, captions=["zorb, a cat", "zorb, a dog"])
    return run, DatasetFacts(
        folders=[folder], regularisation=[FolderFacts(name="cats", repeats=1, captions=["a cat"])],
        shuffle_caption=True, keep_tokens=1, tag_dropout=0.0, validation_images=4, validation_loss=0.25,
        buckets={(128, 128): 12}, mean_aspect_error=0.0, bucket_sides=(64, 256),
    )  # fmt: skip


def test_metadata_is_text_and_states_the_run_without_paths() -> None:
    config = load_config(
        None, ["data.images=/mnt/someone/pics", "data.trigger=zorb", "output.path=/mnt/someone/x.safetensors"]
    )
    metadata = training_metadata(config, *facts())
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ss_network_dim"] == "16"
    assert metadata["ss_network_alpha"] == "8.0"
    assert metadata["ss_v2"] == "False"
    assert metadata["ss_clip_skip"] == "None"
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert json.loads(metadata["ss_tag_frequency"]) == {"pics": {"zorb": 2, "a cat": 1, "a dog": 1}}
    assert json.loads(metadata["ss_dataset_dirs"]) == {"pics": {"n_repeats": 3, "img_count": 2}}
    assert json.loads(metadata["ss_reg_dataset_dirs"]) == {"cats": {"n_repeats": 1, "img_count": 1}}
    counts = [metadata[f"ss_num_{kind}_images"] for kind in ("train", "reg", "validation")]
    assert counts == ["6", "1", "4"]
    assert metadata["sdlora_validation_loss"] == "0.25"
    assert (metadata["ss_min_bucket_reso"], metadata["ss_max_bucket_reso"]) == ("64", "256")
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.date"] == "1970-01-01T00:01:40+00:00"
    assert "someone" not in json.dumps(metadata)
    assert trigger_words(metadata) == ("zorb",)


KOHYA_KEYS = re.findall(
    r"\w+",
    """
    session_id training_started_at training_finished_at output_name training_comment sd_model_name sd_model_hash
    new_sd_model_hash vae_name vae_hash new_vae_hash v2 base_model_version clip_skip max_token_length network_module
    network_dim network_alpha network_dropout network_args learning_rate unet_lr text_encoder_lr optimizer
    lr_scheduler lr_warmup_steps max_grad_norm max_train_steps num_epochs num_batches_per_epoch steps epoch
    gradient_accumulation_steps gradient_checkpointing mixed_precision full_fp16 fp8_base fp8_base_unet seed lowram
    min_snr_gamma debiased_estimation loss_type huber_schedule huber_scale huber_c scale_weight_norms noise_offset
    noise_offset_random_strength adaptive_noise_scale multires_noise_iterations multires_noise_discount
    ip_noise_gamma ip_noise_gamma_random_strength zero_terminal_snr num_train_images num_reg_images dataset_dirs
    reg_dataset_dirs tag_frequency bucket_info resolution batch_size_per_device total_batch_size enable_bucket
    cache_latents color_aug flip_aug random_crop face_crop_aug_range shuffle_caption keep_tokens
    caption_dropout_rate caption_dropout_every_n_epochs resize_interpolation
    caption_tag_dropout_rate bucket_no_upscale min_bucket_reso max_bucket_reso prior_loss_weight num_validation_images
    validation_seed validation_split max_validation_steps validate_every_n_epochs validate_every_n_steps
    """,
)
"""Kohya's keys without ``sd_scripts_commit_hash``, which would be false, and ``datasets``, which replaces single values."""


def configured(*settings: str) -> Config:
    return load_config(None, ["data.images=pics", "data.trigger=zorb", "output.path=x.safetensors", *settings])


def test_all_of_kohya_s_keys_are_there_with_true_values() -> None:
    metadata = training_metadata(configured("output.comment=a note"), *facts())
    assert [key for key in KOHYA_KEYS if f"ss_{key}" not in metadata] == []
    assert metadata["ss_sd_model_name"] == "b.safetensors"
    assert (metadata["ss_sd_model_hash"], metadata["ss_new_sd_model_hash"]) == ("12345678", "0" * 64)
    assert (metadata["ss_vae_hash"], metadata["ss_training_comment"]) == ("None", "a note")


def test_levels_of_metadata() -> None:
    written = [
        "output.author=Ada", "output.license=CC0-1.0", "output.description=Blue, thin lines.", "output.title=Blue paper",
        'output.tags=["style", "paper"]', "output.usage_hint=At 0.8.", "base.clip_skip=2",
    ]  # fmt: skip
    full, minimal = (
        training_metadata(configured(*written, f"output.metadata={level}"), *facts()) for level in ("full", "minimal")
    )
    for metadata in (full, minimal):
        stated = {key.removeprefix("modelspec."): metadata[key] for key in metadata if key.startswith("modelspec.")}
        assert stated["title"] == "Blue paper"
        assert (stated["author"], stated["license"], stated["tags"]) == ("Ada", "CC0-1.0", "style, paper")
        assert (stated["description"], stated["usage_hint"]) == ("Blue, thin lines.", "At 0.8.")
        assert stated["trigger_phrase"] == "zorb"
    assert set(minimal) < set(full)
    kept = ("v2", "base_model_version", "network_module", "network_dim", "network_alpha", "network_args")
    assert {key for key in minimal if key.startswith("ss_")} == {f"ss_{key}" for key in kept}
    assert not any(key.startswith("sdlora") for key in minimal)
    assert training_metadata(configured("output.metadata=none"), *facts()) == {}


def test_trigger_words_of_a_foreign_file() -> None:
    metadata = {"ss_num_train_images": "2", "ss_tag_frequency": json.dumps({"a": {"sks": 2, "cat": 1}})}
    assert trigger_words(metadata) == ("sks",)
    repeated = metadata | {"ss_num_train_images": "20", "ss_dataset_dirs": '{"a": {"n_repeats": 10, "img_count": 2}}'}
    assert trigger_words(repeated) == ("sks",)
    assert trigger_words({"ss_num_train_images": "2", "ss_tag_frequency": "{"}) == ()


def test_tags_are_counted_the_most_frequent_first() -> None:
    assert list(tag_frequency(["b, a", "a,c", "a"]).items()) == [("a", 3), ("b", 1), ("c", 1)]


@given(st.text())
def test_titles_can_be_called_from_a_prompt(name: str) -> None:
    assert set(safe_title(name)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    assert safe_title(name)


@pytest.mark.parametrize(("family", "width"), [("sd1", 768), ("sd2", 1024), ("sdxl", 2048)])
def test_family_is_detected_from_shapes_before_metadata(tmp_path: Path, family: str, width: int) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    lie = FAMILIES["sd1" if family != "sd1" else "sdxl"].kohya_version
    write_lora(tmp_path / "x", {name: low_rank(wide=width)}, {"ss_base_model_version": lie}, dtype=torch.float16)
    found = read_lora(tmp_path / "x").family
    assert found is FAMILIES[family]
