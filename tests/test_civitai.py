"""The folder for an upload, read back with the patterns of the programs that it is for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sdlora
from sdlora.errors import CompatibilityError, Interrupted, LoraFileError
from sdlora.formats.metadata_file import read_metadata, write_metadata
from sdlora.progress import CallbackProgress, ProgressUpdate
from tests.conftest import write_images


@pytest.fixture(scope="module")
def lora(tiny_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for two steps, under a name with a space, with a folder of someone's in its metadata."""
    folder = tmp_path_factory.mktemp("lora")
    file = folder / "my style.safetensors"
    settings = [
        f"base.path={tiny_files['sd1']}", f"data.images={write_images(folder / 'pics')}", "data.trigger=zorb",
        f"output.path={file}", "output.author=Ada", "output.description=Blue lines.", "train.steps=2",
        "data.resolution=64", "samples.prompts=[]",
    ]  # fmt: skip
    sdlora.train(sdlora.load_config(None, settings))
    write_metadata(
        file, file, read_metadata(file) | {"ss_vae_name": "/home/jane/secret/vae.pt", "sshs_model_hash": "00"}
    )
    return file


def made(lora: Path, folder: Path, base: Path, **options) -> sdlora.publish.civitai.Package:
    drawing = {"steps": 1, "size": (64, 64)}
    return sdlora.export_civitai(lora, folder, base=str(base), **drawing | options)


def test_the_package_is_what_an_upload_needs(lora: Path, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "upload"
    package = made(lora, folder, tiny_files["sd1"], weight=0.8, negative="blurry")
    names = {"my-style.safetensors", "my-style.json", "my-style.preview.png", "MODEL_CARD.md", *package.previews}
    assert {file.name for file in folder.iterdir()} == names
    assert set(package.files) == names
    assert len(package.previews) == 4
    data = (folder / "my-style.safetensors").read_bytes()
    payload = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    model = hashlib.sha256(tiny_files["sd1"].read_bytes()).hexdigest()[:10]
    for preview in package.previews:
        with Image.open(folder / preview) as image:
            text = image.info["parameters"]
        assert "Steps: " in text
        # The patterns are those of Civitai's reader of image metadata.
        assert re.findall(r"<lora:([a-zA-Z0-9_.-]+):([0-9.]+)>", text) == [("my-style", "0.8")]
        assert re.search(r'Lora hashes: "([^"]+)"', text)[1] == f"my-style: {payload[:12]}"  # ty: ignore[not-subscriptable]
        hashes = json.loads(re.search(r", Hashes: ({[^}]+})", text)[1])  # ty: ignore[not-subscriptable]
        assert hashes == {"model": model, "lora:my-style": payload[:12]}
        assert f"Model hash: {model}, Model: {tiny_files['sd1'].stem}" in text
        assert text.startswith("zorb, a thing of kind ")
        assert "\nNegative prompt: blurry\n" in text
    assert (folder / "my-style.preview.png").read_bytes() == (folder / package.previews[0]).read_bytes()
    assert json.loads((folder / "my-style.json").read_text()) == {
        "description": "Blue lines.", "sd version": "SD1", "activation text": "zorb", "preferred weight": 0.8,
        "negative text": "blurry", "notes": "Put the word zorb into the prompt.\nMade by Ada",
    }  # fmt: skip
    card = (folder / "MODEL_CARD.md").read_text()
    for fact in (
        "# my-style",
        "| Base model | none that is published: it was made on a base of other shapes sd1",
        "`zorb`",
        "| Recommended weight | 0.8 |",
        "| Images | 5 |",
        "| Steps | 2 |",
        payload[:12],
    ):
        assert fact in card
    metadata = read_metadata(folder / "my-style.safetensors")
    assert metadata["ss_vae_name"] == "vae.pt"
    assert set(json.loads(metadata["ss_dataset_dirs"])) == {"folder-1"}
    assert set(json.loads(metadata["ss_tag_frequency"])) == {"folder-1"}
    assert package.redacted == 3
    assert metadata["sshs_model_hash"] == payload
    assert metadata["modelspec.hash_sha256"] == f"0x{payload}"
    assert sdlora.inspect(folder / "my-style.safetensors").problems == ()
    for file in folder.iterdir():
        assert b"jane" not in file.read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()


def test_foreign_names_become_kohya_s_and_the_family_is_said(tmp_path: Path) -> None:
    """A1111 hides an SDXL file with metadata that does not say SDXL."""
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    second = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {}
    for name, width in ((key, 640), (second, 1280)):
        tensors |= {f"{name}.lora_A.weight": torch.randn(2, width), f"{name}.lora_B.weight": torch.randn(width, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    package = sdlora.export_civitai(tmp_path / "x.safetensors", tmp_path / "up", prompts=())
    assert (package.previews, package.trigger) == ((), ())
    metadata = read_metadata(tmp_path / "up" / package.lora)
    assert metadata["ss_base_model_version"].startswith("sdxl_")
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    names = load_file(tmp_path / "up" / package.lora).keys()
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in names
    assert json.loads((tmp_path / "up" / "x.json").read_text())["sd version"] == "SDXL"
    assert package.warning is None
    assert "| Base model | SDXL 1.0 (Stable Diffusion XL) |" in (tmp_path / "up" / "MODEL_CARD.md").read_text()


def test_a_lora_of_mini_is_not_called_one_of_a_published_base(tmp_path: Path) -> None:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{key}.lora_down.weight": torch.randn(2, 64), f"{key}.lora_up.weight": torch.randn(64, 2)}
    stated = {"ss_base_model_version": "sd_v1", "ss_sd_model_name": "mini"}
    save_file(tensors | {f"{key}.alpha": torch.tensor(2.0)}, tmp_path / "x.safetensors", stated)
    package = sdlora.export_civitai(tmp_path / "x.safetensors", tmp_path / "up", prompts=())
    assert package.warning == (
        "it was made on mini, a base that only sdlora has, and does not fit SD 1.5 or any other published "
        "Stable Diffusion 1.x checkpoint: users of Civitai cannot use it"
    )
    card = (tmp_path / "up" / "MODEL_CARD.md").read_text()
    assert f"| Base model | none that is published: {package.warning} |" in card
    assert package.files == ("MODEL_CARD.md", "x.json", "x.safetensors")


def test_what_cannot_be_packed_leaves_nothing(lora: Path, tiny_files: dict[str, Path], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(LoraFileError, match="exists already"):
        made(lora, taken, tiny_files["sd1"])
    assert [file.name for file in taken.iterdir()] == ["mine.txt"]
    with pytest.raises(CompatibilityError, match=f"^{re.escape(str(lora))}: a LoRA for .* Stable Diffusion XL"):
        made(lora, tmp_path / "up", tiny_files["sdxl"])
    with pytest.raises(LoraFileError, match="weight -1: expected a number above 0"):
        made(lora, tmp_path / "up", tiny_files["sd1"], weight=-1.0)
    broken = load_file(lora)
    next(tensor for name, tensor in broken.items() if "up" in name)[0] = torch.nan
    save_file(broken, tmp_path / "nan.safetensors", read_metadata(lora))
    with pytest.raises(LoraFileError, match=r"nan.safetensors: 1 of its \d+ modules hold NaN or infinity"):
        sdlora.export_civitai(tmp_path / "nan.safetensors", tmp_path / "up", prompts=())
    nameless = tmp_path / "nameless.safetensors"
    save_file(load_file(lora), nameless, {"ss_base_model_version": "sd_v1"})
    with pytest.raises(LoraFileError, match="names no trigger word; give a prompt"):
        made(nameless, tmp_path / "up", tiny_files["sd1"])
    assert {file.name for file in tmp_path.iterdir()} == {"taken", "nameless.safetensors", "nan.safetensors"}


def test_progress_is_reported_and_a_stop_leaves_nothing(
    lora: Path, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    updates: list[ProgressUpdate] = []
    progress = CallbackProgress(updates.append)
    made(lora, tmp_path / "up", tiny_files["sd1"], prompts=["zorb"], steps=3, progress=progress)
    assert (updates[-1].done, updates[-1].total) == (3, 3)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        made(lora, tmp_path / "stopped", tiny_files["sd1"], prompts=["zorb"], stop=stop)
    assert {file.name for file in tmp_path.iterdir()} == {"up"}


def test_the_command(
    lora: Path, tiny_files: dict[str, Path], tmp_path: Path, sdlora: Callable[..., CompletedProcess[str]]
) -> None:
    (tmp_path / "up").mkdir()
    options = ("--base", tiny_files["sd1"], "--prompt", "zorb, a fox", "--steps", 1, "--size", "64x64", "--json")
    result = sdlora("export", lora, "--civitai", "up", *options)
    assert result.returncode == 0, result.stderr
    assert "warning: my-style.safetensors: it was made on" in result.stderr
    assert "users of Civitai cannot use it" in result.stderr
    package = json.loads(result.stdout)
    assert package["previews"] == ["my-style-1.png"]
    assert (tmp_path / "up" / "my-style-1.png").is_file()
    again = sdlora("export", lora, "--civitai", "up", *options)
    assert again.returncode == 1
    assert "exists already" in again.stderr
