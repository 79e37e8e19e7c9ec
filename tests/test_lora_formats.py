"""LoRA files in every format: read whole, written and read again without a bit lost, at full size too."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import sdlora
from recipes.published_modules import modules_of
from sdlora.base.checkpoint import find_base
from sdlora.errors import LoraFileError, SdloraError
from sdlora.families import FAMILIES
from sdlora.formats.keys import kohya_keys, resolve
from sdlora.formats.lora_file import read_lora
from sdlora.formats.lora_writer import write_lora
from sdlora.formats.published import published_modules
from sdlora.formats.readers import lost_elsewhere
from sdlora.formats.safetensors_file import read_header
from sdlora.generation.loras import LoraChoice
from sdlora.lora.kinds import Decomposed, Full
from sdlora.lora.low_rank import LowRank
from tests.tiny import tiny_pipeline, write_tiny_ldm

ATTENTION = r"(\.attn\d\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)$"
KOHYA_DEFAULT = (
    r"(\.attn\d\.to_(q|k|v|out\.0)|\.ff\.net\.(0\.proj|2)|attentions\.\d\.proj_(in|out)"
    r"|self_attn\.\w+_proj|mlp\.fc\d)$"
)


def low_rank(shape: tuple[int, ...], rank: int, alpha: float, *, zeros: bool = False) -> LowRank:
    make = torch.zeros if zeros else torch.randn
    up_shape = (shape[0], rank, *[1] * (len(shape) - 2))
    return LowRank(down=make(rank, *shape[1:]) / 4, up=make(up_shape) / 4, alpha=alpha)


def test_the_published_modules_are_those_of_the_models() -> None:
    for family in FAMILIES:
        assert published_modules(family) == {name: tuple(shape) for name, shape in modules_of(family).items()}


@pytest.mark.parametrize(
    ("family", "pattern", "modules"),
    [
        ("sd1", KOHYA_DEFAULT, 264), ("sd2", KOHYA_DEFAULT, 330), ("sdxl", KOHYA_DEFAULT, 986),
        ("sd1", ATTENTION, 176), ("sdxl", ATTENTION, 736),
    ],
)  # fmt: skip
def test_counts_at_full_size_are_kohya_s(family: str, pattern: str, modules: int, tmp_path: Path) -> None:
    names = {name: shape for name, shape in published_modules(family).items() if re.search(pattern, name)}
    assert len(names) == modules
    changes = {name: low_rank(shape, 1, 1.0, zeros=True) for name, shape in names.items()}
    file = tmp_path / "x.safetensors"
    write_lora(file, changes, {}, dtype=torch.float16, family=FAMILIES[family], base_modules=published_modules(family))
    header = read_header(file, SdloraError)
    assert len(header.tensors) == 3 * modules
    lora = read_lora(file)
    assert lora.family is FAMILIES[family]
    assert set(resolve(lora.modules, published_modules(family)).matched.values()) == set(names)
    blocks = {"sd1": "lora_unet_down_blocks_0", "sd2": "lora_unet_down_blocks_0", "sdxl": "lora_unet_input_blocks_4_1"}
    assert any(name.startswith(blocks[family]) for name in header.tensors)
    text = {name.partition("_text_model")[0] for name in header.tensors if "_text_model" in name}
    assert text == ({"lora_te1", "lora_te2"} if family == "sdxl" else {"lora_te"})


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_round_trips_keep_every_change(family: str, data: st.DataObject, tmp_path: Path) -> None:
    names = {n: s for n, s in published_modules(family).items() if re.search(KOHYA_DEFAULT, n) and max(s) <= 1280}
    chosen = data.draw(st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=8, unique=True))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    changes = {
        name: low_rank(names[name], data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0.5, 1.0, 3.0, 8.0])))
        for name in chosen
    }
    if data.draw(st.booleans()):
        part = chosen[0].partition(".")[0]
        for name in (name for name in chosen if name.startswith(f"{part}.")):
            inner = changes[name]
            magnitude = torch.rand(inner.up.shape[0], *[1] * (inner.up.ndim - 1))
            changes[name] = Decomposed(inner=inner, magnitude=magnitude)  # ty: ignore[invalid-assignment]
    for old in tmp_path.iterdir():
        old.unlink()
    facts = {"family": FAMILIES[family], "base_modules": published_modules(family), "dtype": torch.float32}
    write_lora(tmp_path / "0.safetensors", changes, {"ss_base_model_version": FAMILIES[family].kohya_version}, **facts)  # ty: ignore[invalid-argument-type]
    for step, to in enumerate(("diffusers", "kohya", "peft", "diffusers", "kohya")):
        sdlora.convert(tmp_path / f"{step}.safetensors", tmp_path / f"{step + 1}.safetensors", to=to)
    for one, other in (("1", "4"), ("2", "5")):
        assert (tmp_path / f"{one}.safetensors").read_bytes() == (tmp_path / f"{other}.safetensors").read_bytes()
    for step in range(6):
        lora = read_lora(tmp_path / f"{step}.safetensors")
        found = resolve(lora.modules, published_modules(family)).matched
        assert set(found.values()) >= set(changes)
        for key, name in found.items():
            theirs = lora.modules[key]
            if name not in changes:
                assert theirs.norm() == 0
                assert (family, name.partition(".")[0]) in (("sd2", "text_encoder"), ("sdxl", "text_encoder_2"))
                continue
            ours = changes[name]
            scale = ours.alpha / ours.rank
            assert (ours.kind, ours.rank) == (theirs.kind, theirs.rank)
            assert theirs.alpha == (ours.rank if step else ours.alpha)
            exact = step == 0 or math.frexp(scale)[0] == 0.5
            for role, one in ours.tensors().items():
                expected = one.double() * (scale if step and role == "lora_up.weight" else 1.0)
                found_tensor = theirs.tensors()[role].double()
                if exact or role != "lora_up.weight":
                    assert torch.equal(expected.flatten(), found_tensor.flatten())
                else:
                    torch.testing.assert_close(found_tensor.flatten(), expected.flatten(), rtol=2**-24, atol=0)


UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
LAYER = "encoder.layers.0.self_attn.q_proj"
SPELLINGS = [
    ("kohya", f"lora_unet_{UNET.replace('.', '_')}_to_q", ".lora_down.weight", ".lora_up.weight"),
    ("kohya", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", ".lora_down.weight", ".lora_up.weight"),
    ("simpletuner", f"lycoris_{UNET.replace('.', '_')}_to_q", ".lora_down.weight", ".lora_up.weight"),
    ("peft", f"unet.{UNET}.to_q", ".lora_A.weight", ".lora_B.weight"),
    ("peft", f"base_model.model.{UNET}.to_q", ".lora_A.weight", ".lora_B.weight"),
    ("peft", f"base_model.model.unet.{UNET}.to_q", ".lora_A.default.weight", ".lora_B.default.weight"),
    ("diffusers", f"unet.{UNET}.to_q", ".lora.down.weight", ".lora.up.weight"),
    ("diffusers-processor", f"unet.{UNET}.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
    ("diffusers-processor", f"{UNET}.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
    (
        "comfyui", "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", ".lora_A.weight", ".lora_B.weight",
    ),
    ("kohya", f"lora_te_text_model_{LAYER.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
    ("kohya", f"lora_te1_text_model_{LAYER.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
    ("kohya", f"lora_te1_{LAYER.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
    ("diffusers", f"text_encoder.text_model.{LAYER}", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("peft", f"text_encoder.{LAYER}", ".lora_A.weight", ".lora_B.weight"),
    ("comfyui", f"text_encoders.clip_l.transformer.text_model.{LAYER}", ".lora_A.weight", ".lora_B.weight"),
    ("kohya", f"lora_te2_text_model_{LAYER.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
    ("comfyui", f"text_encoders.clip_g.transformer.text_model.{LAYER}", ".lora_A.weight", ".lora_B.weight"),
    ("kohya", "lora_te2_text_projection", ".lora_down.weight", ".lora_up.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "key", "down", "up"), SPELLINGS)
def test_every_spelling_names_its_sdxl_module(format: str, key: str, down: str, up: str, tmp_path: Path) -> None:
    save_file({key + down: torch.randn(2, 6), key + up: torch.randn(5, 2)}, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors")
    assert (lora.format, lora.problems) == (format, ())
    (name,) = resolve(lora.modules, published_modules("sdxl")).matched.values()
    expected = f"unet.{UNET}.to_q" if "attn1" in key else f"text_encoder.text_model.{LAYER}"
    if "te2" in key or "clip_g" in key:
        expected = "text_encoder_2." + ("text_projection" if "projection" in key else f"text_model.{LAYER}")
    assert name == expected


def test_alphas_of_a_peft_folder_are_read(tmp_path: Path) -> None:
    folder, names = tmp_path / "adapter", (f"{UNET}.to_q", f"{UNET}.to_k")
    folder.mkdir()
    tensors = {}
    for name, rank in zip(names, (4, 2), strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 6)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(5, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"attn1.to_k": 2}, "alpha_pattern": {"attn1.to_k": 3}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    lora = read_lora(folder)
    assert {key: (m.rank, m.alpha) for key, m in lora.modules.items()} == {names[0]: (4, 8.0), names[1]: (2, 3.0)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    assert read_lora(folder).modules[names[0]].alpha == 16.0
    assert sdlora.inspect(folder).modules["unet"] == 2
    assert LoraChoice.parse(str(folder)).file == folder
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(LoraFileError, match=r"adapter_config\.json: cannot be read as JSON"):
        read_lora(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LoraFileError, match=r"lacks adapter_config\.json"):
        read_lora(folder)


def test_bundled_embeddings_and_pickles(tmp_path: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{key}.lora_down.weight": torch.randn(2, 224, 1, 1), f"{key}.lora_up.weight": torch.randn(224, 2, 1, 1),
        "bundle_emb.zorb.clip_l": torch.randn(3, 768), "bundle_emb.zorb.clip_g": torch.randn(3, 1280),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    report = sdlora.inspect(tmp_path / "x.safetensors")
    assert (report.embeddings, report.problems, report.kinds) == (("zorb",), (), {"lora": 1})
    kept = sdlora.convert(tmp_path / "x.safetensors", tmp_path / "kept.safetensors", to="kohya", base="mini")
    assert kept.left_out == ()
    again = load_file(tmp_path / "kept.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    lost = sdlora.convert(tmp_path / "x.safetensors", tmp_path / "lost.safetensors", to="peft", base="mini")
    assert lost.left_out == ("embedding zorb: only kohya's format can bundle one",)
    assert len(load_file(tmp_path / "lost.safetensors")) == 2
    torch.save(tensors, tmp_path / "x.pt")
    assert list(read_lora(tmp_path / "x.pt").modules) == [key]
    pickled = sdlora.inspect(tmp_path / "x.pt")
    assert (pickled.kind, set(pickled.hashes)) == ("lora", {"sha256", "autov1", "autov2"})


def test_mixed_kinds_are_counted_and_cannot_become_peft(tmp_path: Path) -> None:
    names = sorted(name for name in published_modules("sd1") if name.endswith("attn1.to_q"))[:2]
    shape = published_modules("sd1")[names[0]]
    changes = {names[0]: low_rank(shape, 2, 1.0), names[1]: Full(diff=torch.randn(published_modules("sd1")[names[1]]))}
    write_lora(tmp_path / "x.safetensors", changes, {"ss_base_model_version": "sd_v1"}, dtype=torch.bfloat16)
    report = sdlora.inspect(tmp_path / "x.safetensors")
    assert (report.kinds, report.dtype, report.modules["unet"]) == ({"lora": 1, "full": 1}, "bfloat16", 2)
    with pytest.raises(LoraFileError, match="peft files hold only low-rank changes; this LoRA has 1 of kind full"):
        sdlora.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", to="peft")
    assert not (tmp_path / "y.safetensors").exists()


def test_conversions_that_cannot_be(tmp_path: Path) -> None:
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    save_file(
        {"lora_unet_x.lora_down.weight": torch.zeros(2, 3), "lora_unet_x.lora_up.weight": torch.zeros(3, 2)}, source
    )
    for options, message in (
        ({"to": "tar"}, "choose one of kohya, diffusers, peft"),
        ({"to": "peft"}, "do not show its family"),
        ({"to": "peft", "base": "mini"}, "1 of 1 modules are not in Stable Diffusion 1.x, such as lora_unet_x"),
    ):
        with pytest.raises(LoraFileError, match=message):
            sdlora.convert(source, target, **options)  # ty: ignore[invalid-argument-type]
    target.write_bytes(b"mine")
    with pytest.raises(LoraFileError, match="exists already"):
        sdlora.convert(source, target, to="peft")
    assert target.read_bytes() == b"mine"


def test_a_hundred_thousand_tensors_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"lora_unet_{i}.lora_down.weight": entry for i in range(100_000)}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(LoraFileError, match="not a LoRA: it holds 100,000 tensors"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("family", "part"), [("sd1", None), ("sd2", "text_encoder"), ("sdxl", "text_encoder_2")])
def test_attention_that_a1111_reads_as_open_clip_s_is_written_whole(
    family: str, part: str | None, tmp_path: Path
) -> None:
    """``network_apply_weights`` there skips a layer of open_clip's that lacks one of its four projections."""
    names = {
        n: s for n, s in published_modules(family).items() if re.search(r"\.(layers\.[02]\.self_attn\.k_proj|fc1)$", n)
    }
    changes = {name: low_rank(shape, 2, 1.0) for name, shape in names.items()}
    file = tmp_path / "x.safetensors"
    write_lora(file, changes, {}, dtype=torch.float16, family=FAMILIES[family], base_modules=published_modules(family))
    lora = read_lora(file)
    matched = resolve(lora.modules, published_modules(family)).matched
    layers: dict[str, set[str]] = {}
    for name in matched.values():
        if ".self_attn." in name and name.startswith(f"{part}."):
            layers.setdefault(name.rpartition(".")[0], set()).add(name.rpartition(".")[2])
    assert len(layers) == (2 if part else 0)
    assert all(found == {"q_proj", "k_proj", "v_proj", "out_proj"} for found in layers.values())
    assert all(lora.modules[key].norm() == 0 for key, name in matched.items() if name not in changes)
    assert len(matched) == len(changes) + 3 * len(layers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alphas", ["uniform", "mixed"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_diffusers_gives_kohya_s_names_the_same_changes(family: str, alphas: str, tmp_path: Path) -> None:
    """Of all modules where they share an alpha; where not, diffusers 0.42 takes wrong ones, and ours are right."""
    base = tmp_path / "base.safetensors"
    pipe = write_tiny_ldm(base, family)
    shapes, rng = find_base(str(base)).module_shapes(), random.Random(0)
    changes = {
        name: low_rank(shape, 2, rng.choice([1.0, 3.0]) if alphas == "mixed" else 3.0)
        for name, shape in shapes.items()
        if re.search(KOHYA_DEFAULT, name)
    }
    file = tmp_path / "x.safetensors"
    write_lora(file, changes, {}, dtype=torch.float32, family=FAMILIES[family], base_modules=shapes)
    pipe.load_lora_weights(str(tmp_path), weight_name=file.name, adapter_name="x")
    lora = read_lora(file)
    ours = {name: lora.modules[key] for key, name in resolve(lora.modules, shapes).matched.items()}
    assert ours.keys() == changes.keys()
    right, wrong = 0, 0
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for path, module in getattr(pipe, part, torch.nn.Module()).named_modules():
            if not hasattr(module, "lora_A"):
                continue
            name = f"{part}.{path}"
            name = name if name in ours else f"{part}.text_model.{path}"
            change = changes[name]
            product = change.up.double().flatten(1) @ change.down.double().flatten(1) * (change.alpha / 2)
            delta = ours[name].delta(torch.zeros(shapes[name], dtype=torch.float64))
            torch.testing.assert_close(delta.flatten(1), product, rtol=1e-6, atol=1e-9)
            same = torch.allclose(module.get_delta_weight("x").double().flatten(1), product, rtol=1e-4, atol=1e-6)
            right, wrong = right + same, wrong + (not same)
    assert right + wrong == len(changes)
    assert (wrong == 0) is (alphas == "uniform")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_diffusers_draws_the_same_from_a_converted_file_with_mixed_alphas(family: str, tmp_path: Path) -> None:
    """In its own format diffusers reads each alpha from the header; from kohya's names it mixes them up."""
    base = tmp_path / "base.safetensors"
    pipe = write_tiny_ldm(base, family)
    shapes, rng = find_base(str(base)).module_shapes(), random.Random(0)
    changes = {
        name: low_rank(shape, rng.choice([2, 4]), rng.choice([1.0, 3.0]))
        for name, shape in shapes.items()
        if re.search(ATTENTION, name) and name.startswith("unet.")
    }
    facts = {"family": FAMILIES[family], "base_modules": shapes, "dtype": torch.float32}
    write_lora(tmp_path / "kohya.safetensors", changes, {}, **facts)  # ty: ignore[invalid-argument-type]
    drawn = {}
    for to in ("diffusers", "peft"):
        sdlora.convert(tmp_path / "kohya.safetensors", tmp_path / f"{to}.safetensors", to=to, base=str(base))
        pipe = tiny_pipeline(family)
        pipe.load_lora_weights(str(tmp_path), weight_name=f"{to}.safetensors")
        options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        drawn[to] = pipe("a fox", generator=torch.Generator().manual_seed(3), guidance_scale=1.0, **options).images[0]
    ours = sdlora.generate(
        "a fox",
        base=str(base),
        loras=[str(tmp_path / "kohya.safetensors")],
        seed=3,
        steps=2,
        cfg=1.0,
        size=(64, 64),
        sampler="euler" if family == "sdxl" else "ddim",
        precision="float32",
    )[0]
    for to, latents in drawn.items():
        assert (ours.latents - latents).abs().max() < 1e-3, to
    assert load_file(tmp_path / "peft.safetensors").keys() != load_file(tmp_path / "diffusers.safetensors").keys()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_module_s_name_is_known_to_the_other_readers(family: str) -> None:
    names = published_modules(family)
    keys = kohya_keys(names, FAMILIES[family], names.keys())
    assert lost_elsewhere(keys.values(), FAMILIES[family]) == {}


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("sd1", "lora_te_encoder_layers_0_self_attn_q_proj"),
        ("sd1", "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"),
        ("sd1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        ("sdxl", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
        ("sdxl", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out"),
    ],
)
def test_names_that_a_reader_drops_are_reported(family: str, key: str) -> None:
    """What transformers >= 5.6 makes of a text encoder, and blocks named by the other convention, among them."""
    assert "kohya" in lost_elsewhere([key], FAMILIES[family])


def test_a_file_that_another_reader_would_halve_is_not_called_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    wrong = {name: "lora_te_encoder_layers_0_self_attn_q_proj"}
    monkeypatch.setattr("sdlora.formats.lora_writer.kohya_keys", lambda *_: wrong)
    with pytest.raises(LoraFileError, match="kohya would leave out 1 modules of this file, such as lora_te_encoder"):
        write_lora(tmp_path / "x.safetensors", {name: low_rank((768, 768), 2, 1.0)}, {}, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
