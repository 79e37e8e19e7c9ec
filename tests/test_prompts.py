"""Tokens, chunks, weights and conditioning, against diffusers' own encoding and A1111's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdlora.base.base import Base
from sdlora.base.checkpoint import find_base
from sdlora.base.encode import _weighted, encode_prompts
from sdlora.base.load import clip_tokenizer, load_base
from sdlora.base.tokens import Span, padded, plain, token_count, tokenize
from sdlora.config.sections import BaseSection
from sdlora.errors import BaseModelError
from sdlora.families import FAMILIES
from sdlora.generation.prompts import parse_prompt
from tests.tiny import tiny_pipeline

Loaded = tuple[Base, Any]


def opened(file: Path, **options: Any) -> Base:
    checkpoint = find_base(BaseSection(path=str(file), **options))
    return load_base(checkpoint, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module", params=list(FAMILIES))
def loaded(request: pytest.FixtureRequest, tiny_files: dict[str, Path]) -> Loaded:
    return opened(tiny_files[request.param]), tiny_pipeline(request.param)


def test_the_vocabulary_is_clip_s() -> None:
    """Token numbers as OpenAI's own tokenizer gives them."""
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("Hello, World!").input_ids == [49406, 3306, 267, 1002, 256, 49407]
    assert tokenizer.get_vocab()["!"] == 0


@torch.no_grad()
def test_plain_prompts_give_diffusers_numbers(loaded: Loaded) -> None:
    base, pipe = loaded
    for text in ("", "a red fox, masterpiece", "naïve café  ÜBER 🦊", "word " * 75):
        encoded = encode_prompts(base, [tokenize(base, plain(text))])
        reference = pipe.encode_prompt(
            prompt=text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert torch.equal(encoded.context, reference[0])
        assert (encoded.pooled is None) == (len(reference) == 2)
        if encoded.pooled is not None:
            assert torch.equal(encoded.pooled, reference[2])
    for encoder, tokens in zip(base.text_encoders, tokenize(base, plain("a red fox")), strict=True):
        tokenizer = pipe.tokenizer_2 if encoder.facts.part == "text_encoder_2" else pipe.tokenizer
        expected = tokenizer("a red fox", padding="max_length", max_length=77).input_ids
        assert tokens.ids.tolist() == [expected]


@torch.no_grad()
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_reads_the_layer_that_it_names(tiny_files: dict[str, Path], skip: int) -> None:
    for family, file in tiny_files.items():
        base, pipe = opened(file, clip_skip=skip), tiny_pipeline(family)
        context = encode_prompts(base, [tokenize(base, plain("a red fox"))]).context
        layer = max(skip, 2) if family == "sdxl" else skip
        expected = []
        for encoder, tokens in zip(base.text_encoders, tokenize(base, plain("a red fox")), strict=True):
            model = getattr(pipe, encoder.facts.part)
            hidden = model(tokens.ids, output_hidden_states=True).hidden_states[-layer]
            expected.append(hidden if family == "sdxl" else model.final_layer_norm(hidden))
        assert torch.equal(context, torch.cat(expected, -1))
    with pytest.raises(BaseModelError, match="clip skip 4: its text encoder has 3 layers"):
        find_base(BaseSection(path=str(tiny_files["sd1"]), clip_skip=4))


@torch.no_grad()
def test_long_prompts_are_read_in_chunks(loaded: Loaded) -> None:
    base, _ = loaded
    text = " ".join(f"word{i}" for i in range(200))
    tokens = tokenize(base, plain(text))
    ids = clip_tokenizer()(text, add_special_tokens=False, verbose=False).input_ids
    chunks = -(-len(ids) // 75)
    assert token_count(base, text) == len(ids) > 225
    assert all(prompt.chunks == chunks for prompt in tokens)
    read = [i for row in tokens[0].ids.tolist() for i in row[1:76]]
    assert read[: len(ids)] == ids
    assert all(row[0] == 49406 and 49407 in row for row in tokens[0].ids.tolist())
    encoded = encode_prompts(base, [tokens])
    alone = [encode_prompts(base, [tuple(_chunk(prompt, i) for prompt in tokens)]) for i in range(chunks)]
    torch.testing.assert_close(encoded.context, torch.cat([row.context for row in alone], 1), rtol=1e-5, atol=1e-5)
    if encoded.pooled is not None:
        torch.testing.assert_close(encoded.pooled, alone[0].pooled, rtol=1e-5, atol=1e-5)
    limited = tokenize(base, plain(text), limit=150)
    assert limited[0].chunks == 2
    assert [i for row in limited[0].ids.tolist() for i in row[1:76]] == ids[:150]


def _chunk(tokens: Any, number: int) -> Any:
    return type(tokens)(ids=tokens.ids[number : number + 1], weights=tokens.weights[number : number + 1])


def test_a_chunk_ends_at_a_comma_within_reach(loaded: Loaded) -> None:
    base, _ = loaded
    near = ", ".join(["a cat"] * 30)
    rows = tokenize(base, plain(near))[0].ids.tolist()
    assert rows[0][75] == 267 or rows[0][73] == 267
    far = "cat, " + "dog " * 90
    assert 49407 not in tokenize(base, plain(far))[0].ids.tolist()[0][:76]


@torch.no_grad()
def test_batches_and_padding_do_not_change_a_prompt(loaded: Loaded) -> None:
    base, _ = loaded
    short, long = tokenize(base, plain("a fox")), tokenize(base, plain("cat " * 100))
    together = encode_prompts(base, [padded(base, short, 2), long])
    alone = encode_prompts(base, [short])
    torch.testing.assert_close(together.context[:1, :77], alone.context, rtol=1e-5, atol=1e-5)
    empty = encode_prompts(base, [tokenize(base, plain(""))]).context
    torch.testing.assert_close(together.context[:1, 77:], empty, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_weights_multiply_and_keep_the_mean(loaded: Loaded) -> None:
    base, _ = loaded
    neutral = encode_prompts(base, [tokenize(base, plain("a red fox"))]).context
    weighted = encode_prompts(base, [tokenize(base, parse_prompt("a (red:1.5) fox"))]).context
    expected, position = [], 0
    for encoder in base.text_encoders:
        width = encoder.model.config.hidden_size
        hidden = neutral[..., position : position + width].double()
        scaled = hidden.clone()
        scaled[:, 2] *= 1.5
        expected.append(scaled * (hidden.mean() / scaled.mean()))
        position += width
    torch.testing.assert_close(weighted.double(), torch.cat(expected, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_a1111s_formula_rounded_once(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 77, 64).add(0.01).to(dtype)
    weights = torch.rand(2, 77) + 0.5
    exact = hidden.double() * weights.double()[..., None]
    exact *= hidden.double().mean((1, 2), keepdim=True) / exact.mean((1, 2), keepdim=True)
    weighted = _weighted(hidden, weights)
    assert weighted.dtype == dtype
    assert ((weighted.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\] \\", [(r"(literal] \ "[:-1], 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("((a) b)", [("a", 1.21), (" b", 1.1)]),
        ("(b:2)", [("b", 2.0)]),
        ("[less] (x: 0.5) [[y]]", [("less", 1 / 1.1), (" ", 1.0), ("x", 0.5), (" ", 1.0), ("y", 1 / 1.21)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
                (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1),
            ],
        ),
        ("time: 12:30, Big Ben", [("time: 12:30, Big Ben", 1.0)]),
        (")]", [(")]", 1.0)]),
        ("", [("", 1.0)]),
    ],
)  # fmt: skip
def test_a1111_syntax(text: str, spans: list[tuple[str, float]]) -> None:
    """The examples of A1111's own documentation of its parser among them."""
    found = parse_prompt(text)
    assert [span.text for span in found] == [expected for expected, _ in spans]
    assert [span.weight for span in found] == pytest.approx([weight for _, weight in spans])


def test_break_begins_a_chunk(loaded: Loaded) -> None:
    base, _ = loaded
    tokens = tokenize(base, parse_prompt("a cat BREAK a dog"))[0]
    cat, dog = (tokenize(base, plain(text))[0].ids for text in ("a cat", "a dog"))
    assert torch.equal(tokens.ids, torch.cat([cat, dog]))
    assert [span.text for span in parse_prompt("BREAKFAST at Ben's")] == ["BREAKFAST at Ben's"]


@given(st.text())
def test_no_prompt_is_an_error_and_plain_text_stays(text: str) -> None:
    spans = parse_prompt(text)
    assert spans
    if not set(text) & set("\\()[]") and "BREAK" not in text:
        assert spans == (Span(text=text),)
