"""What the loss of a step counts: masks, the weights of sets, and regularisation images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.base.conditioning import Framing, time_ids
from sdlora.config.sections import ObjectiveSection
from sdlora.generation.request import ImageRequest
from sdlora.generation.studio import Studio
from sdlora.progress import Silence
from sdlora.training.batches import draw
from sdlora.training.loss import denoising_loss
from sdlora.training.plan import plan_config
from sdlora.training.preparation import stack_masks
from tests.conftest import write_images
from tests.training_runs import config_for, losses, session_for, toml


def test_masks_weigh_the_squared_errors(tiny_base: Path, tmp_path: Path) -> None:
    """Against the formula in float64 on the UNet's own prediction."""
    session = session_for(tiny_base, write_images(tmp_path / "set", 2), tmp_path / "x.safetensors")
    base, rng = session.base, np.random.default_rng(0)
    shape = next(iter(session.images.values())).mean.shape
    latents, noise = (torch.from_numpy(rng.standard_normal((2, *shape), dtype=np.float32)) for _ in range(2))
    masks = torch.from_numpy(rng.random((2, 1, *shape[1:]), dtype=np.float32))
    masks[1, :, :2] = 0
    timesteps, sizes = torch.tensor([100, 700]), time_ids([Framing.whole(64, 64)] * 2)
    conditioning = session.embeddings.encode(["a", "b"])

    def loss(masks: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
        return denoising_loss(
            base, latents, noise, timesteps, conditioning, sizes, objective=ObjectiveSection(), masks=masks
        ).detach()

    signal = base.schedule.alphas_cumprod.double()[timesteps].view(2, 1, 1, 1)
    noisy = signal.sqrt() * latents.double() + (1 - signal).sqrt() * noise.double()
    with torch.no_grad():
        predicted = base.unet(noisy.float(), timesteps, conditioning.context, return_dict=False)[0].double()
    snr = (signal / (1 - signal)).flatten()
    weight = snr.clamp(max=5) / snr
    squares = (predicted - noise.double()).square()
    expected = weight * (squares * masks.double()).mean((1, 2, 3))
    torch.testing.assert_close(loss(masks, noise).double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(loss(torch.ones_like(masks), noise), loss(None, noise))
    assert not loss(torch.zeros_like(masks), noise).any()
    # What lies outside the mask counts for nothing.
    only = torch.zeros_like(masks)
    only[:, :, 3, 4] = 1
    expected = weight * squares[:, :, 3, 4].sum(1) / squares[0].numel()
    torch.testing.assert_close(loss(only, noise).double(), expected, rtol=1e-4, atol=1e-6)


def test_masks_follow_the_view(tiny_base: Path, tmp_path: Path) -> None:
    more = ("data.mask=alpha", "data.flip=true", "data.crop=random", "train.steps=40", "data.enable_bucket=false")
    images = write_images(tmp_path / "set", 1, sizes=((128, 64),))
    shape = np.zeros((64, 128), np.uint8)
    shape[:32, :64] = 255
    with Image.open(images / "0.png") as image:
        image.putalpha(Image.fromarray(shape))
        image.save(images / "0.png")
    session = session_for(tiny_base, images, tmp_path / "x.safetensors", *more)
    cell, seen = session.base.checkpoint.latent_factor, set()
    for view, cached in session.images.items():
        left = view.placement.left
        expected = shape[:, left : left + 64] / 255
        expected = expected[:, ::-1] if view.flipped else expected
        expected = expected.reshape(64 // cell, cell, 64 // cell, cell).mean((1, 3))
        assert cached.mask is not None
        np.testing.assert_allclose(cached.mask[0].numpy(), expected, atol=1e-6)
        seen.add((left, view.flipped))
    assert seen == {(left, flipped) for left in (0, 16, 32, 48, 64) for flipped in (False, True)}
    unmasked = session_for(tiny_base, images, tmp_path / "x.safetensors", *more[1:], "data.alpha_background='#ffffff'")
    assert all(cached.mask is None for cached in unmasked.images.values())
    masked, plain = losses(session, 3), losses(unmasked, 3)
    assert all(0 < one < other for one, other in zip(masked, plain, strict=True))


def test_masks_out_of_files(tiny_base: Path, tmp_path: Path) -> None:
    images = write_images(tmp_path / "set", 2)
    levels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    (images / "mask").mkdir()
    Image.fromarray(levels).save(images / "mask" / "1.png")
    more = ("data.mask=files", "train.batch_size=2")
    session = session_for(tiny_base, images, tmp_path / "x.safetensors", *more)
    bare, masked = (session.images[view].mask for view in session.plan.training.views(2))
    assert bare is None
    assert masked is not None
    side = 64 // session.base.checkpoint.latent_factor
    expected = (levels / 255).reshape(side, 64 // side, side, 64 // side).mean((1, 3))
    np.testing.assert_allclose(masked[0].numpy(), expected, atol=1e-6)
    both = stack_masks(list(session.images.values()))
    assert both is not None
    assert torch.equal(both[0], torch.ones_like(both[0]))
    assert losses(session, 1)[0] > 0


def test_losses_are_weighted_by_image_set_and_role(tiny_base: Path, tmp_path: Path) -> None:
    own, other = (write_images(tmp_path / name, 3) for name in ("own", "other"))

    def run(weight: float, prior: float, regular: float) -> list[float]:
        sets = [
            {"images": str(own), "loss_weight": weight},
            {"images": str(other), "role": "regularisation", "loss_weight": regular},
        ]
        more = (f"data.sets={toml(sets)}", f"objective.prior_loss_weight={prior}", "train.batch_size=6")
        return losses(session_for(tiny_base, None, tmp_path / "x.safetensors", *more), 1)

    (trained,), (regularised,), (both,), (scaled,) = run(1, 0, 1), run(0, 1, 1), run(1, 1, 1), run(2, 0.5, 3)
    assert trained > 0
    assert regularised > 0
    assert both == pytest.approx(trained + regularised, rel=1e-4)
    assert scaled == pytest.approx(2 * trained + 1.5 * regularised, rel=1e-4)


def test_regularisation_images_that_are_never_shown_are_reported(tiny_base: Path, tmp_path: Path) -> None:
    own, other = write_images(tmp_path / "own", 2), write_images(tmp_path / "other", 5)
    sets = toml([{"images": str(own)}, {"images": str(other), "role": "regularisation"}])
    plan = plan_config(config_for(tiny_base, None, tmp_path / "x.safetensors", f"data.sets={sets}"))
    (finding,) = (finding for finding in plan.findings if finding.code == "regularisation-unused")
    assert "3 of 5 regularisation images" in str(finding)


@pytest.mark.parametrize("text_rate", ["0", "1e-3"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_dropped_caption_is_what_sampling_takes_for_no_negative_prompt(
    tiny_files: dict[str, Path], tmp_path: Path, family: str, text_rate: str
) -> None:
    """SDXL samples without a negative prompt from zeros, the others from the embedding of an empty prompt."""
    rate = f"optimizer.text_encoder_learning_rate={text_rate}"
    more = ("data.caption_dropout=0.5", "data.resolution=64", rate)
    images = write_images(tmp_path / "set", 2)
    session = session_for(tiny_files[family], images, tmp_path / "x.safetensors", *more)
    base, given = session.base, []
    base.unet.register_forward_pre_hook(lambda _, places, named: given.append((places, named)), with_kwargs=True)

    def conditions() -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The context and the pooled summary of every row that the UNet was given since the last call."""
        rows = []
        for (_, _, context), named in given:
            pooled = (named["added_cond_kwargs"] or {}).get("text_embeds")
            rows += [(row, None if pooled is None else pooled[number]) for number, row in enumerate(context.detach())]
        given.clear()
        return rows

    Studio.on(base, []).images(
        [ImageRequest(prompt="zorb", steps=1, size=(64, 64), sampler="euler")], progress=Silence()
    )
    context, pooled = conditions()[0]
    losses(session, 8)
    seed, dropout = session.plan.config.train.seed, session.plan.config.data.caption_dropout
    dropped = [
        draw(seed=seed, step=step, slot=slot, slots=2, shape=(1,), timesteps=1000, caption_dropout=dropout).drop_caption
        for step in range(8)
        for slot in range(2)
    ]
    assert {*dropped} == {True, False}
    for drop, (row, summary) in zip(dropped, conditions(), strict=True):
        assert torch.allclose(row, context, atol=1e-5) == drop
        if pooled is not None:
            assert summary is not None
            assert torch.allclose(summary, pooled, atol=1e-5) == drop
    assert bool(context.any()) == (family == "sd1")
