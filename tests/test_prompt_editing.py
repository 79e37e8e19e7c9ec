"""Prompt editing, alternation and AND: by A1111's documented examples, and by loops over diffusers' UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sdlora
from sdlora.base.base import Base
from sdlora.base.encode import encode_prompts
from sdlora.generation import scheduled_prompt
from sdlora.generation.denoise import denoise
from sdlora.generation.prompt_editing import PromptPart, prompt_parts, texts_over_steps
from sdlora.generation.request import ImageRequest
from sdlora.generation.scheduled_prompt import ScheduledConditioning, encode_requests
from sdlora.progress import Silence
from tests.full_size import META, Watch, full_size_base
from tests.tiny import opened, tiny_pipeline

TREE = (
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
    "[ in background:0.25] [shoddy:masterful:0.5]"
)


@pytest.mark.parametrize(
    ("prompt", "steps", "expected"),
    [
        # The examples of get_learned_conditioning_prompt_schedules: last step of a text, text.
        ("test", 10, [(10, "test")]),
        ("a [b:3]", 10, [(3, "a "), (10, "a b")]),
        ("a [b: 3]", 10, [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", 10, [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", 10, [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", 10, [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", 10, [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", 10, [(10, "a [unbalanced")]),
        ("a [b:.5] c", 10, [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", 10, [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", 4, [(1, "a"), (2, "(b:1.1)"), (3, "a"), (4, "(b:1.1)")]),
        ("[fe|]male", 3, [(1, "female"), (2, "male"), (3, "female")]),
        ("[fe|||]male", 6, [(1, "female"), (4, "male"), (5, "female"), (6, "male")]),
        # The example at the head of its module, and those of its documentation.
        (
            TREE,
            100,
            [
                (25, "fantasy landscape with a mountain and an oak in foreground shoddy"),
                (50, "fantasy landscape with a lake and an oak in foreground in background shoddy"),
                (60, "fantasy landscape with a lake and an oak in foreground in background masterful"),
                (75, "fantasy landscape with a lake and an oak in background masterful"),
                (100, "fantasy landscape with a lake and a christmas tree in background masterful"),
            ],
        ),
        ("a [fantasy:cyberpunk:16] landscape", 20, [(16, "a fantasy landscape"), (20, "a cyberpunk landscape")]),
        ("[cow|cow|horse] in a field", 4, [(2, "cow in a field"), (3, "horse in a field"), (4, "cow in a field")]),
        ("[from::2]", 4, [(2, "from"), (4, "")]),
        # A decimal point makes a share; limits; what is not well formed, or escaped, is text.
        ("[a:b:1.0]", 4, [(4, "a")]),
        ("[a:b:1]", 4, [(1, "a"), (4, "b")]),
        ("[a:b:0]", 4, [(4, "b")]),
        ("[a:b:-1]", 4, [(4, "b")]),
        ("[a:b:1e999]", 4, [(4, "a")]),
        ("[a:b:0.3]", 4, [(1, "a"), (4, "b")]),
        ("[a:b:c:2]", 4, [(4, "[a:b:c:2]")]),
        ("[a (b:2]", 4, [(4, "[a (b:2]")]),
        (r"\[a:b:2\] [\]:c:2]", 4, [(2, r"\[a:b:2\] \]"), (4, r"\[a:b:2\] c")]),
        ("[x [y:3] z", 4, [(3, "[x  z"), (4, "[x y z")]),
        ("[[a|b]:c:2] BREAK d", 4, [(1, "a BREAK d"), (2, "b BREAK d"), (4, "c BREAK d")]),
    ],
)
def test_texts_over_steps_are_those_of_a1111(prompt: str, steps: int, expected: list[tuple[int, str]]) -> None:
    assert runs(texts_over_steps(prompt, steps)) == expected


def runs(texts: Sequence[str]) -> list[tuple[int, str]]:
    last = len(texts) - 1
    return [(step + 1, text) for step, text in enumerate(texts) if step == last or texts[step + 1] != text]


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [
        # A1111's examples with as many steps in the second pass: get_learned_conditioning_prompt_schedules(p, 10, 10).
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")], [(10, "a b c")]),
        ("a [b:1.5] c", [(10, "a  c")], [(5, "a  c"), (10, "a b c")]),
        ("a [b:13] c", [(10, "a  c")], [(3, "a  c"), (10, "a b c")]),
        ("[a|b|c] [d::1.1]", [(n, f"{'abc'[(n - 1) % 3]} d") for n in range(1, 11)], None),
    ],
)
def test_a_second_pass_goes_on_counting(prompt: str, first: Any, second: Any) -> None:
    texts = texts_over_steps(prompt, 10, 10)
    assert runs(texts[:10]) == first
    assert runs(texts[10:]) == (second or [(n, f"{'abc'[(n - 1) % 3]} {'d' * (n < 2)}") for n in range(1, 11)])


def test_a_second_pass_has_its_own_texts(tiny_base: Path) -> None:
    """An edit at the end of the first pass is the other prompt in the second alone."""
    given: dict[str, Any] = {"base": tiny_base, "steps": 3, "seed": 1, "size": 64}
    (edited,) = sdlora.generate("a [fox:owl:1.0]", hires=2, **given)
    (first,) = sdlora.generate("a fox", hires=2, **given)
    (late,) = sdlora.generate("a [fox:owl:6]", hires=2, **given)
    assert torch.equal(late.latents, first.latents)
    assert (edited.latents - first.latents).abs().max() > 1e-3
    (short,) = sdlora.generate("a [fox:owl:1.0]", **given)
    (fox,) = sdlora.generate("a fox", **given)
    assert torch.equal(short.latents, fox.latents)


@given(st.text(alphabet="ab[]()|:.3 \\\n"))
def test_no_prompt_is_an_error(prompt: str) -> None:
    texts = texts_over_steps(prompt, 5)
    assert len(texts) == 5
    if not {":", "|"} & set(prompt):
        assert set(texts) == {prompt}


def test_deep_brackets_are_read() -> None:
    deep = 3000
    assert runs(texts_over_steps("[" * deep + "a" + ":3]" * deep, 4)) == [(3, ""), (4, "a")]
    assert runs(texts_over_steps("[" * deep, 4)) == [(4, "[" * deep)]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("16:9", [("16:9", 1.0)]),
        ("a cat AND a dog", [("a cat", 1.0), (" a dog", 1.0)]),
        ("a cat :1.2 AND a dog AND a penguin :2.2", [("a cat", 1.2), (" a dog", 1.0), (" a penguin", 2.2)]),
        ("a (cat:1.3):-.5 AND a\ndog", [("a (cat:1.3)", -0.5), (" a\ndog", 1.0)]),
        ("SAND ANDROID and", [("SAND ANDROID and", 1.0)]),
    ],
)
def test_parts_are_those_of_a1111(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert prompt_parts(prompt) == tuple(PromptPart(text=text, weight=weight) for text, weight in parts)


Combine = Callable[[Callable[[str], Tensor], int], Tensor]


@torch.no_grad()
def reference(family: str, combine: Combine, *, steps: int, seed: int = 0) -> Tensor:
    """Latents in float64 by diffusers' encoding, UNet and DDIM; ``combine`` gives ε from that of each text, step by step."""
    pipe: Any = tiny_pipeline(family)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)).double()
    unet = pipe.unet.double()

    @cache
    def encoded(text: str) -> tuple[Tensor, dict[str, Tensor] | None]:
        context, _, *pooled = pipe.encode_prompt(
            prompt=text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if family != "sdxl":
            return context.double(), None
        # As diffusers does for SDXL (force_zeros_for_empty_prompt).
        kept = float(text != "")
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64]]).double()
        return kept * context.double(), {"text_embeds": kept * pooled[0].double(), "time_ids": sizes}

    for step, timestep in enumerate(scheduler.timesteps):
        now = latents

        def predicted(text: str, now: Tensor = now, timestep: Tensor = timestep) -> Tensor:
            context, added = encoded(text)
            return unet(now, timestep, context, added_cond_kwargs=added).sample

        latents = scheduler.step(combine(predicted, step), timestep, latents).prev_sample
    return latents


@torch.no_grad()
def drawn(base: Base, *requests: ImageRequest) -> Tensor:
    return denoise(base, requests, encode_requests(base, requests), Silence())


def request(prompt: str, **options: Any) -> ImageRequest:
    return ImageRequest(**({"prompt": prompt, "steps": 5, "size": (64, 64), "sampler": "ddim", "cfg": 4.0} | options))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_an_edited_prompt_is_a_loop_over_diffusers_unet(family: str, tiny_files: dict[str, Path]) -> None:
    positive, negative = ["a red fox", "a red fox", "a blue fox", "a blue fox", "a blue fox"], ["", "b", "", "b", ""]

    def combine(predicted: Callable[[str], Tensor], step: int) -> Tensor:
        without, within = predicted(negative[step]), predicted(positive[step])
        return without + 4 * (within - without)

    base = opened(tiny_files[family])
    latents = drawn(base, request("a [red:blue:0.4] fox", negative="[|b]"))
    expected = reference(family, combine, steps=5)
    assert (latents - expected).abs().max() < 1e-4
    plain = drawn(base, request("a red fox"))
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_and_is_the_sum_of_weighted_differences(family: str, cfg: float, tiny_files: dict[str, Path]) -> None:
    """Liu et al. 2022, equation 11, with guidance; in a batch with images of other parts and of none."""

    def combine(predicted: Callable[[str], Tensor], step: int) -> Tensor:
        without = predicted("grey")
        first = predicted("a cat") - without
        second = predicted(" a dog" if step < 3 else " a fox") - without
        return without + cfg * (1.2 * first + second - 0.3 * (predicted(" red") - without))

    cfg_and_steps: dict[str, Any] = {"cfg": cfg, "steps": 4}
    requests = [
        request("a cat :1.2 AND a [dog:fox:3] AND red :-0.3", **cfg_and_steps, negative="grey"),
        request("a tower AND a sea", **cfg_and_steps, negative="", seed=1),
    ]
    requests += [request("a [tower|sea]", **cfg_and_steps, negative="grey", seed=2)] * (cfg != 1)
    base = opened(tiny_files[family])
    together = drawn(base, *requests)
    assert (together[:1] - reference(family, combine, steps=4)).abs().max() < 1e-4
    for number, one in enumerate(requests):
        alone = drawn(base, one)
        assert (together[number] - alone[0]).abs().max() < 1e-4
        own = of_image(base, requests, number)
        assert (own - alone).abs().max() < 1e-4


@torch.no_grad()
def of_image(base: Base, requests: Sequence[ImageRequest], number: int) -> Tensor:
    """One image by its part of the conditioning of all: what is done where memory does not suffice for all."""
    conditioning = encode_requests(base, requests).of_image(number)
    return denoise(base, [requests[number]], conditioning, Silence())


def test_plain_and_composed_prompts_may_be_mixed_without_guidance(tiny_base: Path) -> None:
    prompts = ["a cat", "a cat AND a dog", "a dog"]
    together = sdlora.generate(prompts, base=tiny_base, cfg=1, steps=2, seed=3)
    for prompt, image in zip(prompts, together, strict=True):
        (alone,) = sdlora.generate(prompt, base=tiny_base, cfg=1, steps=2, seed=3)
        assert (image.latents - alone.latents).abs().max() < 1e-5
        assert image.parameters.startswith(f"{prompt}\n")


@torch.no_grad()
def test_each_text_is_encoded_once(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows = opened(tiny_base), []

    def counted(base: Any, prompts: Any) -> Any:
        rows.append(len(prompts))
        return encode_prompts(base, prompts)

    monkeypatch.setattr(scheduled_prompt, "encode_prompts", counted)
    requests = [request("a [red|blue] fox", steps=20, seed=seed) for seed in range(3)] + [
        request("a red fox", steps=20)
    ]
    conditioning = encode_requests(base, requests)
    assert rows == [3]
    assert conditioning.at(0) is conditioning.at(2) is not conditioning.at(1)
    many = encode_requests(base, [request("[" + "|".join(f"a fox {n}" for n in range(40)) + "]", steps=40)])
    assert sum(rows[1:]) == 41
    assert max(rows) <= 16
    assert many.at(39).context.shape[0] == 2


@torch.no_grad()
def test_plain_prompts_are_the_encoded_texts_themselves(tiny_base: Path) -> None:
    base = opened(tiny_base)
    conditioning = encode_requests(base, [request("a fox", negative="blue"), request("a dog", negative="red")])
    assert isinstance(conditioning, ScheduledConditioning)
    assert all(conditioning.at(step) is conditioning.texts for step in range(5))


def test_a_step_of_edited_and_composed_prompts_copies_nothing(tiny_files: dict[str, Path]) -> None:
    base = full_size_base(tiny_files["sd1"], torch.float16)
    requests = [ImageRequest(prompt="a [fox|dog] AND a [sea:3]", size=(512, 512), steps=4)]
    with torch.no_grad():
        conditioning = encode_requests(base, requests)
        with Watch() as watch:
            latents = denoise(base, requests, conditioning, Silence())
    assert latents.device == META
    assert [tuple(shape) for shape in watch.copied] == [(3, 6), (1, 4, 64, 64), (4,)]
