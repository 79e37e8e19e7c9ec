"""Keys of the cache: whatever changes an encoding changes its key, and nothing else does."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from sdlora.base.base import Base
from sdlora.base.checkpoint import find_base
from sdlora.base.encode import encode_pixels, encode_prompts
from sdlora.base.fingerprints import text_fingerprint, vae_fingerprint
from sdlora.base.load import load_base
from sdlora.base.tokens import plain, tokenize
from sdlora.cache.filling import Job, fill
from sdlora.cache.keys import CacheKey, latent_key, text_key
from sdlora.cache.store import EncodedCache
from sdlora.config.sections import BaseSection
from sdlora.data.buckets import Placement
from sdlora.data.images import open_image, place
from sdlora.progress import Silence
from tests.cached import same
from tests.conftest import write_images

CPU = torch.device("cpu")

# Keys

sides = st.integers(1, 3)
placements = st.builds(
    Placement, width=sides, height=sides, scaled_width=sides, scaled_height=sides, left=sides, top=sides
)
fingerprints = st.sampled_from(["", "a", "ab", "b", '","'])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
devices = st.sampled_from([CPU, torch.device("cuda"), torch.device("cuda", 1)])
images_given = st.fixed_dictionaries(
    {
        "pixels": fingerprints,
        "placement": placements,
        "flipped": st.booleans(),
        "vae": fingerprints,
        "dtype": dtypes,
        "device": devices,
    }
)
chunks = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=1, max_size=2)
captions_given = st.fixed_dictionaries(
    {
        "ids": st.lists(chunks, min_size=1, max_size=2),
        "weights": st.lists(chunks, min_size=1, max_size=2),
        "encoders": fingerprints,
        "dtype": dtypes,
        "device": devices,
    }
)


def caption_key(given: Mapping) -> CacheKey:
    ids = [torch.tensor(rows) for rows in given["ids"]]
    weights = [torch.tensor(rows) * 0.5 for rows in given["weights"]]
    return text_key(**{**given, "ids": ids, "weights": weights})


@given(images_given, images_given, st.data())
def test_distinct_images_have_distinct_keys(first: dict, second: dict, data: st.DataObject) -> None:
    second = {**first, **{name: second[name] for name in data.draw(st.sets(st.sampled_from(sorted(first))))}}
    # GPUs of the same kind compute the same.
    differs = {**first, "device": first["device"].type} != {**second, "device": second["device"].type}
    assert (latent_key(**first) != latent_key(**second)) == differs


@given(captions_given, captions_given, st.data())
def test_distinct_captions_have_distinct_keys(first: dict, second: dict, data: st.DataObject) -> None:
    second = {**first, **{name: second[name] for name in data.draw(st.sets(st.sampled_from(sorted(first))))}}
    differs = {**first, "device": first["device"].type} != {**second, "device": second["device"].type}
    assert (caption_key(first) != caption_key(second)) == differs


def test_keys_change_only_on_purpose() -> None:
    """A change here orphans every user's cache. It needs a new version of the encoding, and vice versa."""
    latents = (
        '["latents", 1, "p", {"height": 96, "left": 1, "scaled_height": 97, "scaled_width": 162, "top": 0, "width": 160}, '
        'true, "v", "torch.bfloat16", "cuda"]'
    )
    placement = Placement(width=160, height=96, scaled_width=162, scaled_height=97, left=1, top=0)
    cuda = torch.device("cuda", 1)
    key = latent_key(pixels="p", placement=placement, flipped=True, vae="v", dtype=torch.bfloat16, device=cuda)
    assert key == CacheKey(kind="latents", digest=hashlib.sha256(latents.encode()).hexdigest())
    text = '["text", 1, [[[[7, 8]]], [[[1.0, 1.5]]]], "e", "torch.float32", "cpu"]'
    ids, weights = [torch.tensor([[7, 8]])], [torch.tensor([[1.0, 1.5]])]
    key = text_key(ids=ids, weights=weights, encoders="e", dtype=torch.float32, device=CPU)
    assert key == CacheKey(kind="text", digest=hashlib.sha256(text.encode()).hexdigest())


# What is encoded again


class Encoding:
    """Passes the images of a folder through a real VAE and the cache, as a run does; records what is encoded."""

    def __init__(self, folder: Path, cache: EncodedCache, base: Base):
        self.folder, self.cache, self.base = folder, cache, base
        self.placement = Placement(width=64, height=64, scaled_width=72, scaled_height=64, left=4, top=0)
        self.flipped = False

    def run(self) -> list[str]:
        """Names of the images that were encoded; all results are compared with a fresh encoding."""
        encoded: list[str] = []
        jobs, fresh = [], []
        vae = vae_fingerprint(self.base)
        for file in sorted(self.folder.glob("*.png")):
            image = open_image(file)
            pixels = place(image, self.placement).flip(-1) if self.flipped else place(image, self.placement)
            key = latent_key(
                pixels=hashlib.sha256(image.tobytes()).hexdigest(),
                placement=self.placement,
                flipped=self.flipped,
                vae=vae,
                dtype=self.base.vae.dtype,
                device=self.base.device,
            )
            jobs.append(Job(key=key, load=lambda name=file.name, pixels=pixels: (name, pixels)))
            fresh.append(self.encode(pixels))

        def encode(loaded: tuple[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            encoded.append(loaded[0])
            return self.encode(loaded[1])

        found = list(fill(self.cache, jobs, encode, progress=Silence(), task="Encoding"))
        assert all(same(tensors, expected) for tensors, expected in zip(found, fresh, strict=True))
        return sorted(encoded)

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = encode_pixels(self.base, pixels[None])
        return {"mean": posterior.mean[0], "std": posterior.std[0]}


ALL = ["0.png", "1.png", "2.png"]


@pytest.fixture
def encoding(tmp_path: Path, tiny_base: Path, cache: EncodedCache) -> Encoding:
    base = load_base(find_base(str(tiny_base)), device=CPU, dtype=torch.float32)
    made = Encoding(write_images(tmp_path / "images", 3, sizes=((72, 64),)), cache, base)
    assert made.run() == ALL
    assert made.run() == []
    return made


def test_an_edited_pixel_encodes_only_its_image(encoding: Encoding) -> None:
    pixels = np.asarray(Image.open(encoding.folder / "1.png")).copy()
    pixels[5, 7, 2] ^= 1
    Image.fromarray(pixels).save(encoding.folder / "1.png")
    assert encoding.run() == ["1.png"]
    assert encoding.run() == []


def test_a_renamed_or_copied_image_is_not_encoded_again(encoding: Encoding) -> None:
    (encoding.folder / "0.png").rename(encoding.folder / "moved.png")
    (encoding.folder / "copy.png").write_bytes((encoding.folder / "2.png").read_bytes())
    assert encoding.run() == []


@pytest.mark.parametrize(
    "change",
    [
        {"width": 32, "height": 32, "scaled_width": 36, "scaled_height": 32},
        {"scaled_width": 80},
        {"left": 5},
        {"left": 0},
    ],
)
def test_another_size_or_crop_encodes_all(encoding: Encoding, change: dict[str, int]) -> None:
    before = encoding.placement
    encoding.placement = replace(before, **change)
    assert encoding.run() == ALL
    encoding.placement = before
    assert encoding.run() == []


def test_a_flip_encodes_all_and_the_unflipped_are_kept(encoding: Encoding) -> None:
    encoding.flipped = True
    assert encoding.run() == ALL
    encoding.flipped = False
    assert encoding.run() == []


def test_another_precision_encodes_all(encoding: Encoding) -> None:
    encoding.base.vae.to(torch.bfloat16)
    assert encoding.run() == ALL


def test_another_vae_encodes_all_and_another_decoder_nothing(encoding: Encoding, tiny_base: Path) -> None:
    with torch.no_grad():
        encoding.base.vae.decoder.conv_in.weight[0, 0, 0, 0] += 1
    assert encoding.run() == []
    with torch.no_grad():
        encoding.base.vae.encoder.mid_block.resnets[0].conv1.bias[-1] += 1e-3
    assert encoding.run() == ALL


def test_a_vae_named_by_the_user_encodes_all_and_its_exact_copy_nothing(
    encoding: Encoding, tiny_base: Path, tmp_path: Path
) -> None:
    source = tiny_base / "vae"
    weights = next(source.glob("*.safetensors"))
    for name, changed in (("copy", False), ("other", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(weights)
        if changed:
            tensors["encoder.conv_in.bias"][0] += 0.01
        save_file(tensors, tmp_path / name / weights.name)

    def load(vae: str) -> Base:
        checkpoint = find_base(BaseSection(path=str(tiny_base), vae=str(tmp_path / vae)))
        return load_base(checkpoint, device=CPU, dtype=torch.float32)

    encoding.base = load("copy")
    assert encoding.run() == []
    encoding.base = load("other")
    assert encoding.run() == ALL


def test_captions_are_encoded_again_for_another_encoder_or_layer(tiny_base: Path, cache: EncodedCache) -> None:
    def encoded(base: Base, *captions: str) -> list[int]:
        made: list[int] = []
        jobs = []
        for number, caption in enumerate(captions):
            tokens = tokenize(base, plain(caption))
            key = text_key(
                ids=[encoder.ids for encoder in tokens],
                weights=[encoder.weights for encoder in tokens],
                encoders=text_fingerprint(base),
                dtype=base.dtype,
                device=base.device,
            )
            jobs.append(Job(key=key, load=lambda number=number, tokens=tokens: (number, tokens)))

        def encode(loaded) -> dict[str, torch.Tensor]:
            made.append(loaded[0])
            with torch.no_grad():
                return {"context": encode_prompts(base, [loaded[1]]).context[0]}

        fresh = [encode((0, tokenize(base, plain(caption))))["context"] for caption in captions]
        made.clear()
        found = fill(cache, jobs, encode, progress=Silence(), task="Encoding")
        assert all(torch.equal(tensors["context"], row) for tensors, row in zip(found, fresh, strict=True))
        return sorted(made)

    base = load_base(find_base(str(tiny_base)), device=CPU, dtype=torch.float32)
    assert encoded(base, "", "a red fox", "a blue fox") == [0, 1, 2]
    assert encoded(base, "a red fox", "a  RED fox", "", "two foxes") == [3]
    deeper = load_base(find_base(BaseSection(path=str(tiny_base), clip_skip=2)), device=CPU, dtype=torch.float32)
    assert encoded(deeper, "", "a red fox") == [0, 1]
    with torch.no_grad():
        next(base.text_encoders[0].model.parameters())[-1, -1] += 1
    assert encoded(base, "", "a red fox") == [0, 1]
