"""Single files and folders of every family: what they are, and what is loaded from them."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdlora
from sdlora.base.base import Base
from sdlora.base.checkpoint import find_base
from sdlora.base.detect import detect_checkpoint
from sdlora.config.sections import BaseSection
from sdlora.errors import BaseModelError, SdloraError
from sdlora.families import FAMILIES
from sdlora.formats.hashes import hash_file
from sdlora.formats.safetensors_file import read_header
from sdlora.formats.tensor_files import Wanted, open_tensor_file, read_tensors
from sdlora.tools.inspect_report import as_text
from tests.conftest import run_sdlora
from tests.tiny import CPU, opened, parts_of, tiny_ldm_tensors, tiny_pipeline, write_tiny_ldm

Made = tuple[Path, Any]


@pytest.fixture(scope="module", params=list(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(single file, the pipeline that it was made from)."""
    file = tmp_path_factory.mktemp("ldm") / f"{request.param}.safetensors"
    return file, write_tiny_ldm(file, request.param)


@pytest.fixture(scope="module")
def made_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Made:
    file = tmp_path_factory.mktemp("ldm") / "sdxl.safetensors"
    return file, write_tiny_ldm(file, "sdxl")


def same_models(base: Base, pipe: Any) -> None:
    ours = {"unet": base.unet, "vae": base.vae} | {e.facts.part: e.model for e in base.text_encoders}
    for part, model in ours.items():
        theirs = getattr(pipe, part).state_dict()
        assert model.state_dict().keys() == theirs.keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, theirs[name]), f"{part}.{name}"


@torch.no_grad()
def test_a_single_file_computes_what_its_models_computed(made: Made) -> None:
    file, pipe = made
    base = opened(file)
    same_models(base, pipe)
    latents, times, pixels = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.rand(1, 3, 64, 64)
    context = torch.randn(2, 77, pipe.unet.config.cross_attention_dim)
    added = {"text_embeds": torch.randn(2, 48), "time_ids": torch.rand(2, 6) * 64} if file.stem == "sdxl" else None
    outputs = [unet(latents, times, context, added_cond_kwargs=added)[0] for unet in (base.unet, pipe.unet)]
    assert torch.equal(*outputs)
    assert outputs[0].std() > 0.01
    assert torch.equal(base.vae.encode(pixels).latent_dist.mean, pipe.vae.encode(pixels).latent_dist.mean)
    assert torch.equal(base.vae.decode(latents)[0], pipe.vae.decode(latents)[0])
    ids = torch.randint(0, 49406, (2, 77))
    ids[:, 60:] = 49407
    for encoder in base.text_encoders:
        ours, theirs = (m(ids, output_hidden_states=True) for m in (encoder.model, getattr(pipe, encoder.facts.part)))
        assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
        assert torch.equal(ours[0], theirs[0])


def test_a_folder_is_loaded_as_diffusers_loads_it(made: Made, tmp_path: Path) -> None:
    file, pipe = made
    pipe.save_pretrained(tmp_path / "folder")
    same_models(opened(tmp_path / "folder"), pipe)
    found = detect_checkpoint(tmp_path / "folder")
    assert (found.format, found.require_family().name) == ("diffusers", file.stem)


def test_marked_variants_and_pickled_folders_are_found(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd1")
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*.safetensors"))) > 1
    pipe.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    for folder in ("half", "shards", "pickled"):
        same_models(opened(tmp_path / folder), pipe)


def test_pickles_are_read_where_they_hold_tensors_alone(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd2")
    torch.save({"state_dict": tiny_ldm_tensors(pipe, "sd2"), "global_step": 875000}, tmp_path / "a.ckpt")
    same_models(opened(tmp_path / "a.ckpt"), pipe)
    found = detect_checkpoint(tmp_path / "a.ckpt")
    assert (found.schedule.prediction, found.prediction_source) == ("epsilon", "family")

    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"state_dict": {"x": torch.zeros(1)}, "callback": Harm()}, tmp_path / "b.ckpt")
    (tmp_path / "c.ckpt").write_bytes(pickle.dumps(Harm(), protocol=2))
    for name in ("b.ckpt", "c.ckpt"):
        with pytest.raises(BaseModelError, match=r"loading would execute posix\.mkdir") as caught:
            detect_checkpoint(tmp_path / name)
        assert len(caught.value.problems) == 1
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_numbers_are_converted_as_torch_converts_them(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "big": torch.randn(700, 1000).to(stored),
        "dot": torch.tensor(3.5, dtype=stored),
        "none": torch.zeros(0, 4),
    }
    tensors["none"] = tensors["none"].to(stored)
    save_file(tensors, tmp_path / "x.safetensors")
    file = open_tensor_file(tmp_path / "x.safetensors", BaseModelError)
    places = {name: Wanted(file=file, stored=place(name), shape=tuple(t.shape)) for name, t in tensors.items()}
    read = read_tensors(places, dtype=wanted, device=CPU)
    for name, tensor in tensors.items():
        expected = tensor.float().to(wanted)
        assert torch.equal(read[name], expected), name


def place(name: str):
    from sdlora.formats.checkpoint_keys import Stored

    return Stored(name=name)


def test_replacement_parts_are_used(tmp_path: Path) -> None:
    pipe, other = tiny_pipeline("sd1"), tiny_pipeline("sd1", seed=1)
    tensors = tiny_ldm_tensors(pipe, "sd1")
    save_file({k: v for k, v in tensors.items() if k.startswith("model.")}, tmp_path / "unet.safetensors")
    with pytest.raises(BaseModelError) as caught:
        find_base(str(tmp_path / "unet.safetensors"))
    assert [problem.partition("; ")[2] for problem in caught.value.problems] == [
        "name a file or folder with base.vae",
        "name a file or folder with base.text_encoder",
    ]
    theirs = tiny_ldm_tensors(other, "sd1")
    vae = {k.removeprefix("first_stage_model."): v for k, v in theirs.items() if k.startswith("first_stage_model.")}
    save_file(vae, tmp_path / "vae.safetensors")
    save_file(theirs, tmp_path / "whole.safetensors")
    other.vae.save_pretrained(tmp_path / "vae")
    other.text_encoder.save_pretrained(tmp_path / "te")
    pipe.unet.save_pretrained(tmp_path / "unet_folder")
    encoder = parts_of(other)["text_encoder"]
    save_file(encoder, tmp_path / "clip_l.safetensors")
    other.unet = pipe.unet
    for vae_from in ("vae.safetensors", "whole.safetensors", "vae"):
        for encoder_from in ("whole.safetensors", "te", "clip_l.safetensors"):
            for unet_from in ("unet.safetensors", "unet_folder/diffusion_pytorch_model.safetensors"):
                options = {"vae": str(tmp_path / vae_from), "text_encoder": str(tmp_path / encoder_from)}
                same_models(opened(tmp_path / unet_from, **options), other)
    with pytest.raises(BaseModelError, match="holds no text encoder"):
        opened(tmp_path / "unet.safetensors", vae=str(tmp_path / "vae"), text_encoder=str(tmp_path / "vae.safetensors"))
    with pytest.raises(BaseModelError, match="does not use a second text encoder"):
        opened(tmp_path / "whole.safetensors", text_encoder_2=str(tmp_path / "te"))


def test_a_replacement_vae_works_for_every_family(made: Made, tmp_path: Path) -> None:
    file, _ = made
    other = tiny_pipeline(file.stem, seed=3)
    other.vae.save_pretrained(tmp_path / "vae")
    options = {"size": (64, 64), "steps": 1, "precision": "float32", "seed": 0}
    first = sdlora.generate("a fox", base=str(file), **options)[0]  # ty: ignore[invalid-argument-type]
    section = BaseSection(path=str(file), vae=str(tmp_path / "vae"))
    replaced = sdlora.generate("a fox", base=section, **options)[0]  # ty: ignore[invalid-argument-type]
    assert torch.equal(first.latents, replaced.latents)
    expected = other.vae.decode(first.latents[None] / FAMILIES[file.stem].latent_scale)[0]
    pixels = expected.detach().div(2).add(0.5).clamp(0, 1).mul(255).round()[0].permute(1, 2, 0)
    shown = torch.frombuffer(bytearray(replaced.image.tobytes()), dtype=torch.uint8).view(64, 64, 3)
    assert (shown.float() - pixels).abs().max() <= 1
    assert first.image.tobytes() != replaced.image.tobytes()


def test_the_vae_is_never_half_precision(made: Made) -> None:
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        base = opened(made[0], dtype)
        assert (base.unet.dtype, base.vae.dtype) == (dtype, expected)
        assert {p.dtype for encoder in base.text_encoders for p in encoder.model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("family", "metadata", "markers", "prediction", "source", "terminal"),
    [
        ("sd1", {}, (), "epsilon", "family", False),
        ("sd1", {"modelspec.prediction_type": "v"}, (), "v_prediction", "metadata", False),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction", "metadata", False),
        ("sd2", {}, (), "epsilon", "weights", False),
        ("sd2", {}, ("wide bias",), "v_prediction", "weights", False),
        ("sdxl", {}, ("v_pred", "ztsnr"), "v_prediction", "marker tensor", True),
        ("sdxl", {"modelspec.prediction_type": "epsilon"}, ("v_pred",), "v_prediction", "marker tensor", False),
    ],
)
def test_prediction_types_are_detected(
    family: str, metadata: dict, markers: tuple, prediction: str, source: str, terminal: bool, tmp_path: Path
) -> None:
    tensors = tiny_ldm_tensors(tiny_pipeline(family), family)
    for marker in markers:
        if marker == "wide bias":
            name = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"
            tensors[name] = torch.randn_like(tensors[name])
        else:
            tensors[marker] = torch.zeros(0)
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    found = detect_checkpoint(tmp_path / "x.safetensors")
    assert (found.schedule.prediction, found.prediction_source) == (prediction, source)
    assert found.schedule.zero_terminal_snr is terminal
    assert bool(found.notes) == ("modelspec.prediction_type" in metadata and source == "marker tensor")
    section = BaseSection(path=str(tmp_path / "x.safetensors"), prediction="v_prediction", zero_terminal_snr=True)
    assert find_base(section).schedule.prediction == "v_prediction"
    assert (
        float(opened(section.path, prediction="v_prediction", zero_terminal_snr=True).schedule.alphas_cumprod[-1]) == 0
    )


def test_zero_terminal_snr_needs_v_prediction(made: Made) -> None:
    with pytest.raises(BaseModelError, match=r"zero-terminal SNR needs v-prediction.*base\.prediction"):
        find_base(BaseSection(path=str(made[0]), prediction="epsilon", zero_terminal_snr=True))


def test_a_scheduler_rescaled_for_sampling_does_not_make_a_zero_terminal_base(tmp_path: Path) -> None:
    tiny_pipeline("sd1").save_pretrained(tmp_path / "x")
    file = tmp_path / "x" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    assert not find_base(str(tmp_path / "x")).schedule.zero_terminal_snr
    as_v = BaseSection(path=str(tmp_path / "x"), prediction="v_prediction")
    assert find_base(as_v).schedule.zero_terminal_snr


def test_distilled_models_are_noted(tmp_path: Path) -> None:
    write_tiny_ldm(tmp_path / "dreamTurbo_v2.safetensors", "sd1")
    assert "few steps" in sdlora.inspect(tmp_path / "dreamTurbo_v2.safetensors").notes[0]


def test_inspect_reports_what_a_checkpoint_is(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, pipe = made
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    family = FAMILIES[file.stem]
    report = sdlora.inspect(file)
    assert (report.kind, report.family, report.format, report.dtype) == ("checkpoint", file.stem, "ldm", "float32")
    assert (report.prediction, report.resolution, report.ema_tensors) == ("epsilon", family.resolution, 1)
    assert report.parameters is not None
    assert report.parameters["unet"] == sum(p.numel() for p in pipe.unet.parameters())
    assert report.parameters["vae"] == sum(p.numel() for p in pipe.vae.parameters())
    assert set(report.parameters) == {"unet", "vae", *(encoder.part for encoder in family.text_encoders)}
    assert (report.problems, report.notes, report.hashes) == ((), (), {})
    text = as_text(report)
    assert f"  prediction  epsilon (from the {report.prediction_source})" in text
    assert "  parameters  unet " in text
    assert f"  image size  {family.resolution} x {family.resolution} pixels" in text
    hashed = sdlora.inspect(file, hashes=True).hashes
    expected = hash_file(file, read_header(file, SdloraError).payload_start)
    assert hashed == expected.by_name()
    assert set(hashed) == {"sha256", "autov1", "autov2", "autov3"}


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "x.safetensors"
    write_tiny_ldm(file, "sd1")
    first = sdlora.inspect(file, hashes=True).hashes
    (memory,) = (tmp_path / "cache").rglob("*.json")
    assert str(tmp_path) not in memory.read_text()
    monkeypatch.setattr("sdlora.formats.hashes.hash_file", None)
    assert sdlora.inspect(file, hashes=True).hashes == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tiny_ldm(file, "sd1", seed=1)
    assert sdlora.inspect(file, hashes=True).hashes["sha256"] != first["sha256"]
    memory.write_text("{broken")
    assert sdlora.inspect(file, hashes=True).hashes["sha256"] == hash_file(file, 0).sha256


def test_sniffing_reads_a_header_and_takes_milliseconds(made: Made, tmp_path: Path) -> None:
    header = made[0].read_bytes()[: read_header(made[0], SdloraError).payload_start]
    sparse = tmp_path / "sparse.safetensors"
    sparse.write_bytes(header)
    with sparse.open("ab") as stream:
        stream.truncate(made[0].stat().st_size)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert detect_checkpoint(sparse).require_family().name == made[0].stem
        times.append(time.perf_counter() - began)
    assert min(times) < 0.05


def test_memory_while_loading_is_that_of_what_stays(tmp_path: Path) -> None:
    """A 120 MB file in float16, loaded as bfloat16 in a process of its own."""
    write_tiny_ldm(tmp_path / "x.safetensors", "sd1", block_out_channels=(256, 768))
    half = {k: v.half() for k, v in load_file(tmp_path / "x.safetensors").items()}
    save_file(half, tmp_path / "x.safetensors")
    code = """
import re, sys, torch
from sdlora.base.checkpoint import find_base
from sdlora.base.load import clip_tokenizer, load_base
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
tiny, big = (find_base(path) for path in sys.argv[1:])
load_base(tiny, device=torch.device("cpu"), dtype=torch.bfloat16)
clip_tokenizer()
before = peak()
base = load_base(big, device=torch.device("cpu"), dtype=torch.bfloat16)
stays = sum(p.nbytes for m in (base.unet, base.vae, base.text_encoders[0].model) for p in m.parameters())
print(stays, peak() - before)
"""
    write_tiny_ldm(tmp_path / "tiny.safetensors", "sd1")
    command = [sys.executable, "-c", code, str(tmp_path / "tiny.safetensors"), str(tmp_path / "x.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    stays, grown = map(int, result.stdout.split())
    assert stays > 100e6
    assert grown < 1.15 * stays


def test_no_network_and_no_hub_are_touched(made_sdxl: Made, tmp_path: Path) -> None:
    code = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("the network was touched")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import sdlora
print(sdlora.generate("a fox", base=sys.argv[1], steps=1, size=(64, 64))[0].latents.isfinite().all().item())
"""
    environment = {"HF_HOME": str(tmp_path / "hub"), "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code, str(made_sdxl[0])], capture_output=True, text=True, env=environment, check=False
    )
    assert result.stdout.strip() == "True", result.stderr


def test_the_command_line_takes_single_files(made_sdxl: Made, tmp_path: Path) -> None:
    report = json.loads(run_sdlora("inspect", made_sdxl[0], "--json", cwd=tmp_path).stdout)
    assert (report["kind"], report["family"], report["prediction"]) == ("checkpoint", made_sdxl[0].stem, "epsilon")
    result = run_sdlora(
        *("generate", "a (red:1.2) fox", "--base", made_sdxl[0], "--steps", 1, "--size", "64x64", "--out", "x.png"),
        *("--clip-skip", 2, "--attention", "xformers"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "xformers cannot be used" in result.stderr
    wrong = run_sdlora("generate", "x", "--base", made_sdxl[0], "--prediction", "v", "--clip-skip", 30, cwd=tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr.count("error: base.") == 2
