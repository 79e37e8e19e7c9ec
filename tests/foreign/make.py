"""Write the LoRA files of this folder by hand, in the spellings and kinds that other programs use.

    python tests/foreign/make.py

Names, shapes and formulas are typed out from the descriptions of the formats, in numpy alone: nothing of sdlora is used, so
that what is read here was not written by the reader's own tables. ``expected.json`` states what each file holds;
``expected.safetensors`` holds the change of each weight, in float64. The weight W itself is ``weight(shape)``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy import ndarray
from safetensors.numpy import save_file

HERE = Path(__file__).parent
OUT, IN, RANK = 12, 8, 2
LINEAR, CONV = (OUT, IN), (OUT, IN, 3, 3)
rng = np.random.default_rng(2026)


def weight(shape: tuple[int, ...]) -> ndarray:
    """The base's weight, float64: a number for each place that needs no file."""
    return np.sin(1.0 + np.arange(np.prod(shape))).reshape(shape)


def random(*shape: int) -> ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def alpha(value: float, dtype: type = np.float32) -> ndarray:
    return np.array(value, dtype)


class File:
    """The tensors of one file, and what they are meant to be."""

    def __init__(self, format: str, *, metadata: dict[str, str] | None = None):
        self.tensors: dict[str, ndarray] = {}
        self.format, self.metadata = format, metadata
        self.modules: dict[str, str] = {}
        self.changes: dict[str, ndarray] = {}
        self.embeddings: list[str] = []

    def add(self, module: str, kind: str, change: ndarray, tensors: dict[str, ndarray]) -> None:
        self.tensors |= tensors
        self.modules[module], self.changes[module] = kind, change.astype(np.float64)

    def low_rank(
        self,
        module: str,
        key: str,
        *,
        down: str = ".lora_down.weight",
        up: str = ".lora_up.weight",
        shape: tuple[int, ...] = LINEAR,
        rank: int = RANK,
        scale: float | None = None,
        stored_alpha: ndarray | None = None,
    ) -> None:
        """One module; ``scale`` is alpha / rank where the file keeps alpha elsewhere, ``stored_alpha`` where it holds it."""
        a, b = random(rank, *shape[1:]), random(shape[0], rank, *[1] * (len(shape) - 2))
        factor = scale if scale is not None else 1.0 if stored_alpha is None else float(stored_alpha) / rank
        product = np.tensordot(b.reshape(shape[0], rank).astype(np.float64), a.astype(np.float64), 1)
        tensors = {key + down: a, key + up: b}
        if stored_alpha is not None:
            tensors[f"{key}.alpha"] = stored_alpha
        self.add(module, "lora", factor * product, tensors)


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def kohya_sd1() -> File:
    file = File("kohya", metadata={"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora"})
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    file.low_rank(f"unet.{BLOCK}.attn1.to_q", f"{block}_attn1_to_q", stored_alpha=alpha(1))
    file.low_rank(f"unet.{BLOCK}.attn2.to_out.0", f"{block}_attn2_to_out_0", rank=4, stored_alpha=alpha(1))
    file.low_rank(f"unet.{BLOCK}.ff.net.0.proj", f"{block}_ff_net_0_proj", stored_alpha=alpha(3, np.int64))
    name = "mid_block.attentions.0.proj_in"
    file.low_rank(f"unet.{name}", "lora_unet_mid_block_attentions_0_proj_in", shape=(OUT, IN, 1, 1))
    file.low_rank(f"text_encoder.{TEXT}", "lora_te_text_model_encoder_layers_0_self_attn_q_proj", stored_alpha=alpha(2))
    return file


def kohya_sdxl() -> File:
    file = File("kohya", metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    for module, key in (
        (f"unet.{BLOCK}.attn1.to_q", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        ("unet.mid_block.attentions.0.proj_in", "lora_unet_middle_block_1_proj_in"),
        (
            "unet.up_blocks.0.attentions.2.transformer_blocks.9.ff.net.2",
            "lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_2",
        ),
        (f"text_encoder.{TEXT}", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1", "lora_te2_text_model_encoder_layers_31_mlp_fc1"),
    ):
        file.low_rank(module, key, stored_alpha=alpha(1))
    file.low_rank(
        "unet.down_blocks.1.resnets.0.conv1",
        "lora_unet_input_blocks_4_0_in_layers_2",
        shape=CONV,
        stored_alpha=alpha(1),
    )
    return file


def kohya_under_new_transformers() -> File:
    """The text encoder's paths as they are since transformers 5.6, without ``text_model``."""
    file = File("kohya")
    file.low_rank(f"text_encoder.{TEXT}", "lora_te_encoder_layers_0_self_attn_q_proj", stored_alpha=alpha(1))
    return file


def onetrainer_legacy_sdxl() -> File:
    """SDXL under diffusers' block names."""
    file = File("kohya", metadata={"ss_base_model_version": "sdxl_base_v1-0"})
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    file.low_rank(f"unet.{BLOCK}.attn1.to_q", key, stored_alpha=alpha(1))
    file.low_rank(
        "text_encoder_2.text_model.encoder.layers.3.self_attn.out_proj",
        "lora_te2_text_model_encoder_layers_3_self_attn_out_proj",
        stored_alpha=alpha(1),
    )
    return file


def onetrainer_comfyui() -> File:
    file = File("comfyui")
    names = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
    for module, key in (
        (f"unet.{BLOCK}.attn1.to_q", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"),
        (f"text_encoder.{TEXT}", f"text_encoders.clip_l.transformer.{TEXT}"),
        (f"text_encoder_2.{TEXT}", f"text_encoders.clip_g.transformer.{TEXT}"),
    ):
        file.low_rank(module, key, **names, stored_alpha=alpha(1))
    return file


def simpletuner() -> File:
    file = File("simpletuner")
    key = "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    file.low_rank(f"unet.{BLOCK}.attn1.to_q", key, stored_alpha=alpha(1))
    return file


def diffusers_peft() -> File:
    """With alphas in the header: one for most, others by pattern."""
    described = {
        "unet.r": RANK, "unet.lora_alpha": 4, "unet.alpha_pattern": {f"{BLOCK}.attn1.to_k": 1},
        "unet.rank_pattern": {f"{BLOCK}.attn1.to_k": 4}, "text_encoder.r": RANK, "text_encoder.lora_alpha": 3,
        "text_encoder.use_rslora": True,
    }  # fmt: skip
    file = File("peft", metadata={"format": "pt", "lora_adapter_metadata": json.dumps(described)})
    names = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
    file.low_rank(f"unet.{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn1.to_q", **names, scale=4 / RANK)
    file.low_rank(f"unet.{BLOCK}.attn1.to_k", f"unet.{BLOCK}.attn1.to_k", **names, rank=4, scale=1 / 4)
    file.low_rank(f"text_encoder.{TEXT}", f"text_encoder.{TEXT}", **names, scale=3 / RANK**0.5)
    return file


def diffusers_before_peft() -> File:
    file = File("diffusers")
    key = f"unet.{BLOCK}.attn1.to_q"
    file.low_rank(key, key, down=".lora.down.weight", up=".lora.up.weight")
    key = f"text_encoder.{TEXT}"
    file.low_rank(key, key, down=".lora_linear_layer.down.weight", up=".lora_linear_layer.up.weight")
    return file


def diffusers_processors() -> File:
    file = File("diffusers-processor")
    names = {"down": "_lora.down.weight", "up": "_lora.up.weight"}
    file.low_rank(f"unet.{BLOCK}.attn1.to_q", f"unet.{BLOCK}.attn1.processor.to_q", **names)
    file.low_rank(f"unet.{BLOCK}.attn2.to_out.0", f"unet.{BLOCK}.attn2.processor.to_out", **names)
    return file


def peft_model() -> File:
    file = File("peft")
    names = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
    file.low_rank(f"unet.{BLOCK}.attn1.to_q", f"base_model.model.{BLOCK}.attn1.to_q", **names)
    return file


def lycoris_locon() -> File:
    file = File("kohya")
    a, b, core = random(RANK, IN, 1, 1), random(OUT, RANK, 1, 1), random(RANK, RANK, 3, 3)
    change = np.zeros(CONV)
    for m in range(RANK):
        for n in range(RANK):
            outer = np.outer(b[:, m, 0, 0].astype(np.float64), a[n, :, 0, 0])
            change += outer[:, :, None, None] * core[m, n]
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    named = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.lora_mid.weight": core}
    file.add("unet.down_blocks.0.resnets.0.conv1", "lora", 0.5 * change, named | {f"{key}.alpha": alpha(1)})
    file.low_rank(
        "unet.down_blocks.0.resnets.0.conv2",
        "lora_unet_down_blocks_0_resnets_0_conv2",
        shape=CONV,
        stored_alpha=alpha(4),
    )
    return file


def lycoris_loha() -> File:
    file, block = File("kohya"), "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    key = f"{block}_attn1_to_q"
    parts = {
        "w1_a": random(OUT, RANK), "w1_b": random(RANK, IN), "w2_a": random(OUT, RANK), "w2_b": random(RANK, IN),
    }  # fmt: skip
    exact = {name: part.astype(np.float64) for name, part in parts.items()}
    change = (exact["w1_a"] @ exact["w1_b"]) * (exact["w2_a"] @ exact["w2_b"]) * (1 / RANK)
    named = {f"{key}.hada_{name}": part for name, part in parts.items()}
    file.add(f"unet.{BLOCK}.attn1.to_q", "loha", change, named | {f"{key}.alpha": alpha(1)})

    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    parts = {
        "t1": random(RANK, RANK, 3, 3), "w1_a": random(RANK, OUT), "w1_b": random(RANK, IN),
        "t2": random(RANK, RANK, 3, 3), "w2_a": random(RANK, OUT), "w2_b": random(RANK, IN),
    }  # fmt: skip
    halves = []
    for number in "12":
        core, left, right = (parts[name].astype(np.float64) for name in (f"t{number}", f"w{number}_a", f"w{number}_b"))
        half = np.zeros(CONV)
        for i in range(RANK):
            for j in range(RANK):
                half += np.outer(left[i], right[j])[:, :, None, None] * core[i, j]
        halves.append(half)
    named = {f"{key}.hada_{name}": part for name, part in parts.items()}
    change = halves[0] * halves[1] * (3 / RANK)
    file.add("unet.down_blocks.0.resnets.0.conv1", "loha", change, named | {f"{key}.alpha": alpha(3)})
    return file


def kronecker(first: ndarray, second: ndarray) -> ndarray:
    result = np.zeros((first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]))
    for i in range(first.shape[0]):
        for j in range(first.shape[1]):
            rows = slice(i * second.shape[0], (i + 1) * second.shape[0])
            columns = slice(j * second.shape[1], (j + 1) * second.shape[1])
            result[rows, columns] = first[i, j] * second.astype(np.float64)
    return result


def lycoris_lokr() -> File:
    file, block = File("kohya"), "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    w1, w2 = random(3, 2), random(4, 4)
    key = f"{block}_attn1_to_q"
    # Both whole: there is no rank to divide alpha by, and loaders ignore it.
    tensors = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2, f"{key}.alpha": alpha(7)}
    file.add(f"unet.{BLOCK}.attn1.to_q", "lokr", kronecker(w1, w2), tensors)

    w1, left, right = random(3, 2), random(4, RANK), random(RANK, 4)
    key = f"{block}_attn1_to_k"
    change = kronecker(w1, left.astype(np.float64) @ right) * (1 / RANK)
    tensors = {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": left, f"{key}.lokr_w2_b": right, f"{key}.alpha": alpha(1)}
    file.add(f"unet.{BLOCK}.attn1.to_k", "lokr", change, tensors)
    return file


def lycoris_dora() -> File:
    file, block = File("kohya"), "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    for path, magnitude, axis in (
        ("attn1.to_q", np.abs(random(OUT, 1)) + 0.5, 1),
        ("attn1.to_k", np.abs(random(1, IN)) + 0.5, 0),
    ):
        a, b = random(RANK, IN), random(OUT, RANK)
        changed = weight(LINEAR) + 0.5 * (b.astype(np.float64) @ a)
        norms = np.sqrt((changed**2).sum(axis, keepdims=True))
        key = f"{block}_{path.replace('.', '_')}"
        tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.dora_scale": magnitude}
        change = changed * (magnitude / norms) - weight(LINEAR)
        file.add(f"unet.{BLOCK}.{path}", "dora", change, tensors | {f"{key}.alpha": alpha(1)})
    return file


def peft_dora() -> File:
    file, key = File("peft"), f"unet.{BLOCK}.attn1.to_q"
    a, b, magnitude = random(RANK, IN), random(OUT, RANK), np.abs(random(OUT)) + 0.5
    changed = weight(LINEAR) + b.astype(np.float64) @ a
    change = changed * (magnitude / np.sqrt((changed**2).sum(1)))[:, None] - weight(LINEAR)
    tensors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.lora_magnitude_vector.weight": magnitude}
    file.add(key, "dora", change, tensors)
    return file


def lycoris_ia3() -> File:
    file, block = File("kohya"), "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    scale = random(OUT)
    key = f"{block}_attn1_to_k"
    change = weight(LINEAR) * scale[:, None]
    file.add(f"unet.{BLOCK}.attn1.to_k", "ia3", change, {f"{key}.weight": scale, f"{key}.on_input": np.array(False)})
    scale = random(IN)
    key = f"{block}_ff_net_2"
    change = weight(LINEAR) * scale[None, :]
    file.add(f"unet.{BLOCK}.ff.net.2", "ia3", change, {f"{key}.weight": scale, f"{key}.on_input": np.array(True)})
    return file


def lycoris_full_and_norms() -> File:
    file, block = File("kohya"), "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    difference = random(*LINEAR)
    tensors = {f"{block}_attn1_to_out_0.diff": difference, f"{block}_attn1_to_out_0.diff_b": random(OUT)}
    file.add(f"unet.{BLOCK}.attn1.to_out.0", "full", difference, tensors)
    difference = random(OUT)
    tensors = {f"{block}_norm1.w_norm": difference, f"{block}_norm1.b_norm": random(OUT)}
    file.add(f"unet.{BLOCK}.norm1", "full", difference, tensors)
    return file


def glora(*, old: bool) -> File:
    """New: a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in). Before, the first of each pair was the second."""
    file, key = File("kohya"), "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    a1, a2, b1, b2 = random(IN, RANK), random(RANK, IN), random(OUT, RANK), random(RANK, IN)
    change = weight(LINEAR) @ a1.astype(np.float64) @ a2 + b1.astype(np.float64) @ b2
    parts = {"a1": a2, "a2": a1, "b1": b2, "b2": b1} if old else {"a1": a1, "a2": a2, "b1": b1, "b2": b2}
    tensors = {f"{key}.{name}.weight": part for name, part in parts.items()} | {f"{key}.alpha": alpha(1)}
    file.add(f"unet.{BLOCK}.attn1.to_q", "glora", change / RANK, tensors)
    return file


def rotations(blocks: ndarray, limit: float) -> ndarray:
    """Cayley: (I + Q)(I - Q)⁻¹ of Q = S - Sᵀ, which is shortened to ``limit`` where it is longer."""
    skew = blocks.astype(np.float64) - blocks.astype(np.float64).transpose(0, 2, 1)
    length = np.sqrt((skew**2).sum())
    if limit and length > limit:
        skew *= limit / length
    eye = np.eye(blocks.shape[1])
    return np.stack([(eye + q) @ np.linalg.inv(eye - q) for q in skew])


def turned(matrix: ndarray, blocks: ndarray) -> ndarray:
    """Each block of outputs, times the transpose of its rotation."""
    rows = blocks.shape[1]
    return np.concatenate([blocks[k].T @ matrix[k * rows : (k + 1) * rows] for k in range(len(blocks))])


def oft(*, prefix: str, constraint: float | None) -> File:
    file = File("kohya")
    key = f"{prefix}_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    blocks = 0.3 * random(3, 4, 4)
    change = turned(weight(LINEAR), rotations(blocks, (constraint or 0) * OUT)) - weight(LINEAR)
    tensors = {f"{key}.oft_blocks": blocks}
    if constraint is not None:
        tensors[f"{key}.alpha"] = alpha(constraint)
    file.add(f"unet.{BLOCK}.attn1.to_q", "oft", change, tensors)
    return file


def oft_as_it_was() -> File:
    """LyCORIS at first kept the rotations themselves, as ``oft_diag``."""
    file, key = File("kohya"), "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    blocks = rotations(0.3 * random(3, 4, 4), 0).astype(np.float32)
    change = turned(weight(LINEAR), blocks.astype(np.float64)) - weight(LINEAR)
    file.add(f"unet.{BLOCK}.attn1.to_q", "oft", change, {f"{key}.oft_diag": blocks, f"{key}.alpha": alpha(1)})
    return file


def bundled() -> File:
    file = kohya_sd1()
    file.tensors |= {"bundle_emb.zorb.clip_l": random(2, 16), "bundle_emb.old.string_to_param.*": random(1, 16)}
    file.embeddings = ["old", "zorb"]
    return file


FILES = {
    "kohya-sd1": kohya_sd1(),
    "kohya-sdxl": kohya_sdxl(),
    "kohya-transformers-5.6": kohya_under_new_transformers(),
    "onetrainer-legacy-sdxl": onetrainer_legacy_sdxl(),
    "onetrainer-comfyui": onetrainer_comfyui(),
    "simpletuner": simpletuner(),
    "diffusers-peft": diffusers_peft(),
    "diffusers-before-peft": diffusers_before_peft(),
    "diffusers-processors": diffusers_processors(),
    "peft-model": peft_model(),
    "lycoris-locon": lycoris_locon(),
    "lycoris-loha": lycoris_loha(),
    "lycoris-lokr": lycoris_lokr(),
    "lycoris-dora": lycoris_dora(),
    "peft-dora": peft_dora(),
    "lycoris-ia3": lycoris_ia3(),
    "lycoris-full": lycoris_full_and_norms(),
    "glora": glora(old=False),
    "glora-old": glora(old=True),
    "lycoris-oft": oft(prefix="lora_unet", constraint=None),
    "kohya-oft": oft(prefix="oft_unet", constraint=0.05),
    "lycoris-oft-old": oft_as_it_was(),
    "bundled-embeddings": bundled(),
}

if __name__ == "__main__":
    expected, changes = {}, {}
    for name, file in FILES.items():
        save_file(file.tensors, HERE / f"{name}.safetensors", file.metadata)
        expected[name] = {"format": file.format, "modules": file.modules, "embeddings": file.embeddings}
        changes |= {f"{name}|{module}": change for module, change in file.changes.items()}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")
    save_file(changes, HERE / "expected.safetensors")
