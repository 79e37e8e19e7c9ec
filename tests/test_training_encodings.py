"""What a run encodes, keeps, and reads from the cache: views of images and variants of captions."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import sdlora as package
from sdlora.base.conditioning import Conditioning
from sdlora.base.load import load_base
from sdlora.data.images import as_pixels, open_image, place
from sdlora.training.plan import plan_config
from tests.conftest import write_images
from tests.training_runs import STEPS, config_for, everything, losses, same_but_for_times, session_for


def test_a_cached_run_is_the_same_to_the_bit_and_encodes_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = json.dumps(str(tmp_path / "cache"))
    more = [*everything(tmp_path), f"cache.folder={folder}", "train.steps=5", "optimizer.text_encoder_learning_rate=0"]
    outputs = [tmp_path / name / "x.safetensors" for name in ("bare", "filling", "filled")]
    package.train(config_for(tiny_base, None, outputs[0], *more, "cache.disk=false"))
    assert not (tmp_path / "cache").exists()
    package.train(config_for(tiny_base, None, outputs[1], *more))

    def refuse(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("sdlora.training.latents.encode_pixels", refuse)
    monkeypatch.setattr("sdlora.training.caption_embeddings.encode_prompts", refuse)
    package.train(config_for(tiny_base, None, outputs[2], *more))
    for other in outputs[1:]:
        same_but_for_times(outputs[0], other)


def test_embeddings_that_are_kept_are_bounded(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdlora.training.caption_embeddings.KEPT_BYTES", 0)
    monkeypatch.setattr("sdlora.training.caption_embeddings.WRITTEN_BYTES", 20_000)
    more = (f"cache.folder={json.dumps(str(tmp_path / 'cache'))}", "optimizer.text_encoder_learning_rate=0")
    session = session_for(tiny_base, write_images(tmp_path / "set", 1), tmp_path / "x.safetensors", *more)
    captions = [f"thing {number}" for number in range(80)]
    first, again = (session.embeddings.encode(captions).context for _ in range(2))
    assert torch.equal(first, again)
    written = sum(1 for _ in (tmp_path / "cache").rglob("*.safetensors")) - 1  # One of them is the image's.
    assert written == 20_000 // first[0].nbytes
    assert written > 0


def test_flipped_views_are_mirrored_images(tiny_base: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "set", 1, sizes=((96, 64),))
    more = ("data.flip=true", "train.steps=30", "data.enable_bucket=false", "data.crop=random", "cache.disk=false")
    session = session_for(tiny_base, images, tmp_path / "x.safetensors", *more)
    with Image.open(images / "0.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(images / "0.png")
    mirrored = session_for(tiny_base, images, tmp_path / "x.safetensors", *more)
    for view, cached in session.images.items():
        (twin,) = (
            image
            for other, image in mirrored.images.items()
            if other.left == view.left and other.flipped != view.flipped
        )
        torch.testing.assert_close(cached.mean, twin.mean, rtol=1e-4, atol=1e-4)
        assert cached.framing == twin.framing
    assert len({cached.framing.left for cached in session.images.values()}) == 5


def test_views_of_an_image_are_cut_from_one_decoding(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdlora.data import kept_images
    from sdlora.training import latents

    images = write_images(tmp_path / "set", 2, sizes=((400, 130),))
    more = ("data.flip=true", "data.crop=random", "train.steps=60", "data.enable_bucket=false", "cache.disk=false")
    opened: list[Path] = []

    def counting(file: Path, background: str) -> Image.Image:
        opened.append(file)
        return open_image(file, background)

    monkeypatch.setattr(kept_images, "open_image", counting)
    plan = plan_config(config_for(tiny_base, images, tmp_path / "x.safetensors", *more))
    base = load_base(plan.base, device=torch.device("cpu"), dtype=torch.float32)
    plan.kept.clear()
    views = plan.training.views(60)
    assert len(views) == 20
    jobs = latents.latent_jobs(base, plan.items, views, plan.config, plan.kept)
    with ThreadPoolExecutor(6) as pool:
        loaded = list(pool.map(lambda job: job.load(), jobs))
    assert sorted(opened) == sorted(images.glob("*.png"))
    for view, pixels in zip(views, loaded, strict=True):
        whole = place(open_image(plan.items[view.item].source.file), view.placement)
        assert torch.equal(as_pixels(pixels), whole.flip(-1) if view.flipped else whole)


def test_each_variant_is_encoded_once(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []

    def counting(*given: object) -> Conditioning:
        encoded.append(1)
        return encode(*given)  # ty: ignore[invalid-argument-type]

    from sdlora.training import caption_embeddings as embeddings

    encode = embeddings.encode_prompts
    monkeypatch.setattr(embeddings, "encode_prompts", counting)
    more = [*everything(tmp_path), "optimizer.text_encoder_learning_rate=0", "cache.disk=false"]
    session = session_for(tiny_base, None, tmp_path / "x.safetensors", *more)
    assert not encoded
    asked: set[str] = set()
    encode_captions = session.embeddings.encode

    def spy(captions: list[str]) -> Conditioning:
        asked.update(captions)
        return encode_captions(captions)

    monkeypatch.setattr(session.embeddings, "encode", spy)
    losses(session, STEPS)
    assert "" in asked
    assert len(asked) > 5
    assert len(encoded) == len(asked)


def test_shuffled_tags_never_need_more_chunks_than_there_are(tiny_base: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "set", 1)
    tags = [
        "one two three four five six seven eight nine ten eleven",
        "ab",
        "cd ef",
        *("gh ij kl mn op qr st" * 2,) * 8,
    ]
    (images / "0.txt").write_text(", ".join(tags))
    session = session_for(tiny_base, images, tmp_path / "x.safetensors", "data.shuffle_tags=true", "train.steps=60")
    captions = {sample.caption for step in range(60) for sample in session.plan.training.batch(step)}
    assert len(captions) > 20
    rows = session.embeddings.encode(sorted(captions))
    assert rows.context.shape[:2] == (len(captions), 77 * session.embeddings.chunks)
