"""Captions: what the rules make of them, and that every drawn variant is a function of seed, epoch and image."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdlora.data.captions import (
    MAX_DEPTH,
    MAX_VARIANTS,
    CaptionRules,
    draw_wildcards,
    has_word,
    split_tags,
    wildcard_variants,
    with_trigger,
    without_word,
)
from sdlora.randomness import Stream
from tests.conftest import ROOT

TAGS = st.lists(st.text("abcdefgh", min_size=1, max_size=5), min_size=1, max_size=12, unique=True)


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a party", "art", "art, a party"),
        ("modern art, a cat", "art", "modern art, a cat"),
        ("ART deco", "art", "ART deco"),
        ("a fox (zorb)", "zorb", "a fox (zorb)"),
        ("zorbs", "zorb", "zorb, zorbs"),
        ("ein Bär", "är", "är, ein Bär"),
        ("c++ code", "c++", "c++ code"),
        ("", "zorb", "zorb"),
    ],
)
def test_trigger_is_a_word_not_a_substring(caption: str, trigger: str, expected: str) -> None:
    assert with_trigger(caption, trigger) == expected
    assert CaptionRules(trigger=trigger).plain([caption]) == expected


@given(st.text(max_size=60), st.text(min_size=1, max_size=20).filter(lambda text: text.strip() == text))
def test_trigger_is_in_every_caption_and_added_once(caption: str, trigger: str) -> None:
    once = with_trigger(caption, trigger)
    assert has_word(once, trigger) or not trigger[0].isalnum() or not trigger[-1].isalnum()
    if has_word(once, trigger):
        assert with_trigger(once, trigger) == once


@pytest.mark.parametrize(
    ("rules", "caption", "expected"),
    [
        ({"trigger_as": "prefix"}, "a cat, Zorb, red", "zorb, a cat, red"),
        ({"trigger_as": "prefix"}, "a photo of zorb style", "zorb, a photo of style"),
        ({"trigger_as": "prefix"}, "zorb", "zorb"),
        ({"trigger_as": "prefix"}, "a zorbs", "zorb, a zorbs"),
        ({"trigger_as": "template", "template": "a {caption} in {trigger} style"}, "cat", "a cat in zorb style"),
        ({"trigger_as": "template"}, "", "zorb"),
        ({"trigger_as": "template"}, "{trigger} {x}", "zorb, {trigger} {x}"),
        ({"trigger": "", "trigger_as": "template"}, "a cat", "a cat"),
        ({"trigger": ""}, "", ""),
        ({"prefix": "best quality, ", "suffix": ", outdoors"}, "a cat", "best quality, zorb, a cat, outdoors"),
        ({"prefix": "photo of"}, "zorb", "photo of zorb"),
        ({"prefix": "zorb style,"}, "a cat", "zorb style, a cat"),
        ({"replace": (("grey", "gray"), ("gray", "silver"))}, "zorb, grey", "zorb, silver"),
        ({"replace": (("a cat", "zorb"),)}, "a cat", "zorb"),
        ({"wildcards": True}, "{red|blue} zorb", "red zorb"),
        ({"wildcards": True, "replace": (("red", "{green|red}"),)}, "{red|blue} zorb", "green zorb"),
        ({"wildcards": True, "prefix": "{p|q} r,", "suffix": "{zorb|s}"}, "{a|b}", "p r, a zorb"),
        ({}, "{red|blue}\n zorb", "{red|blue} zorb"),
        ({"shuffle_tags": True}, "zorb ,a,, (b, c:1.2)", "zorb, a, (b, c:1.2)"),
    ],
)
def test_rules_in_their_order(rules: dict, caption: str, expected: str) -> None:
    assert CaptionRules(**{"trigger": "zorb", **rules}).plain([caption]) == expected


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        ("a, b ,, c", ["a", "b", "c"]),
        ("(red hair, freckles:1.2), x", ["(red hair, freckles:1.2)", "x"]),
        ("[a, b], ((c, d), e), f", ["[a, b]", "((c, d), e)", "f"]),
        (":(, a, :), b", [":(, a, :)", "b"]),
        (":(, a, b", [":(", "a", "b"]),
        (r"saber \(fate, x\), y", [r"saber \(fate", r"x\)", "y"]),
        ("[a, (b], c)", ["[a, (b]", "c)"]),
        ("", []),
    ],
)
def test_commas_in_brackets_split_nothing(caption: str, tags: list[str]) -> None:
    assert split_tags(caption) == tags


@given(st.text("ab,()[]\\ ", max_size=30))
def test_tags_hold_every_letter_of_the_caption(caption: str) -> None:
    def letters(text: str) -> str:
        return re.sub(r"[\s,]", "", text)

    assert letters("".join(split_tags(caption))) == letters(caption)


def wildcard_texts(depth: int = 2) -> st.SearchStrategy[tuple[str, set[str]]]:
    """Texts with their variants, put together from the inside: what a parser must find again."""
    plain = st.text("xyz ", max_size=3).map(lambda text: (text, {text}))
    if depth == 0:
        return plain
    inner = wildcard_texts(depth - 1)
    choice = st.lists(inner, min_size=2, max_size=3).map(
        lambda parts: ("{" + "|".join(text for text, _ in parts) + "}", set().union(*(made for _, made in parts)))
    )

    def row(parts: list[tuple[str, set[str]]]) -> tuple[str, set[str]]:
        made = {"".join(pieces) for pieces in itertools.product(*(made for _, made in parts))}
        return "".join(text for text, _ in parts), made

    return st.lists(plain | choice, max_size=2).map(row)


@given(wildcard_texts(), st.integers(0, 99))
def test_wildcards_make_every_variant_and_no_other(text_and_made: tuple[str, set[str]], seed: int) -> None:
    text, made = text_and_made
    assert set(wildcard_variants([text])) == {(variant,) for variant in made}
    rng = np.random.default_rng(seed)
    assert draw_wildcards(text, lambda count: int(rng.integers(count))) in made


@pytest.mark.parametrize("text", ["{", "}{", "{a}", "a|b", "{{retro}}", "{a|b", "a|b}", r"\{a|b\}", "{a {b} c}"])
def test_braces_that_are_no_wildcard_are_text(text: str) -> None:
    assert wildcard_variants([text]) == ((text,),)


@given(st.text("{}|a\\", max_size=60))
def test_any_braces_can_be_drawn_from(text: str) -> None:
    assert (draw_wildcards(text, lambda _: 0),) in wildcard_variants([text]) or len(wildcard_variants([text])) == 2


def test_many_and_deep_wildcards_stay_within_bounds() -> None:
    many = " ".join(["{a|bbb|c c}"] * 40)
    assert wildcard_variants([many, "x"]) == ((" ".join(["c c"] * 40), "x"), (" ".join(["bbb"] * 40), "x"))
    assert len(wildcard_variants(["{a|b}" * 4] * 2)) == MAX_VARIANTS
    assert len(wildcard_variants(["{a|b}" * 4, "{a|b}" * 5])) == 1
    assert wildcard_variants(["{a|a}" * 40 + "{b|c}"]) == (("a" * 40 + "b",), ("a" * 40 + "c",))
    assert draw_wildcards("{a|" * 5000 + "}" * 5000, lambda _: 1).count("{") == 5000 - MAX_DEPTH


@given(TAGS, st.integers(0, 5), st.integers(0, 2**32 - 1), st.integers(0, 99), st.integers(0, 10**6))
def test_shuffling_keeps_all_tags_and_the_first_in_place(
    tags: list[str], keep: int, seed: int, epoch: int, image: int
) -> None:
    rules = CaptionRules(trigger="zorb", shuffle_tags=True, keep_tokens=keep)
    made = rules.caption([", ".join(tags)], seed=seed, epoch=epoch, image=image).split(", ")
    assert sorted(made) == sorted(["zorb", *tags])
    assert made[: max(1, keep)] == ["zorb", *tags][: max(1, keep)]
    assert made == rules.caption([", ".join(tags)], seed=seed, epoch=epoch, image=image).split(", ")


@given(TAGS, st.integers(0, 11), st.floats(0, 0.99), st.booleans(), st.integers(0, 999))
def test_the_trigger_is_neither_moved_nor_dropped(
    tags: list[str], at: int, dropout: float, shuffle: bool, epoch: int
) -> None:
    at = min(at, len(tags))
    given_tags = [*tags[:at], "(big zorb, old:1.1)", *tags[at:]]
    rules = CaptionRules(trigger="zorb", shuffle_tags=shuffle, tag_dropout=dropout, keep_tokens=1)
    made = split_tags(rules.caption([", ".join(given_tags)], seed=1, epoch=epoch, image=0))
    assert "(big zorb, old:1.1)" in made
    assert made[0] == given_tags[0]
    assert set(made) <= set(given_tags)
    if not shuffle:
        assert made == [tag for tag in given_tags if tag in made]
    if not dropout:
        assert made[at] == "(big zorb, old:1.1)"


def test_a_trigger_of_several_tags_stays_together() -> None:
    rules = CaptionRules(trigger="zorb, by old", shuffle_tags=True, tag_dropout=0.9)
    for epoch in range(30):
        made = rules.caption(["a, b, c, d"], seed=0, epoch=epoch, image=0)
        assert made.startswith("zorb, by old")


def test_tags_are_dropped_as_often_as_asked_and_orders_are_even() -> None:
    dropping = CaptionRules(trigger="zorb", tag_dropout=0.3)
    made = [dropping.caption(["a, b, c, d"], seed=3, epoch=epoch, image=7) for epoch in range(2000)]
    for tag in "abcd":
        assert 0.26 < 1 - np.mean([tag in text.split(", ") for text in made]) < 0.34
    shuffling = CaptionRules(trigger="", shuffle_tags=True)
    orders = Counter(shuffling.caption(["a, b, c"], seed=3, epoch=epoch, image=7) for epoch in range(3000))
    assert len(orders) == 6
    assert all(430 < count < 570 for count in orders.values())


def test_lines_and_wildcards_are_drawn_evenly_and_apart() -> None:
    rules = CaptionRules(trigger="", wildcards=True)
    made = Counter(rules.caption(["{a|b} x", "y", "z"], seed=0, epoch=e, image=i) for e in range(60) for i in range(50))
    assert set(made) == {"a x", "b x", "y", "z"}
    assert 900 < made["y"] < 1100
    assert 430 < made["a x"] < 570


def test_every_argument_of_a_draw_counts_and_nothing_else() -> None:
    rules = CaptionRules(trigger="zorb", shuffle_tags=True)
    caption = [", ".join("abcdefghijkl")]
    variant = rules.caption(caption, seed=1, epoch=2, image=3)
    others = [
        rules.caption(caption, seed=2, epoch=2, image=3),
        rules.caption(caption, seed=1, epoch=3, image=3),
        rules.caption(caption, seed=1, epoch=2, image=4),
    ]
    assert variant not in others
    assert len({variant, *others}) == 4
    code = (
        "from sdlora.data.captions import CaptionRules;"
        f"print(CaptionRules(trigger='zorb', shuffle_tags=True).caption({caption!r}, seed=1, epoch=2, image=3))"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "7"}
    )
    assert elsewhere.stdout.strip() == variant


def test_a_caption_that_was_once_drawn_stays_the_same() -> None:
    """A run that was begun with an earlier version goes on as it would have."""
    rules = CaptionRules(trigger="zorb", wildcards=True, shuffle_tags=True, tag_dropout=0.25, keep_tokens=1)
    texts = ["a {red|blue|green} cat, b, c, d, e", "f, g, h"]
    made = [rules.caption(texts, seed=42, epoch=epoch, image=5) for epoch in range(4)]
    assert made == ["zorb, c, e, d, a green cat", "zorb, h, g", "zorb, a red cat, c, b", "zorb, e, b, c, a blue cat, d"]


def test_no_two_streams_share_a_number() -> None:
    numbers = [stream.value for stream in Stream.__members__.values()]
    assert len(set(numbers)) == len(numbers) == 19


@given(wildcard_texts(1), TAGS, st.booleans(), st.floats(0, 0.9), st.integers(0, 99))
def test_the_longest_variants_hold_at_least_as_many_words_as_any_drawn(
    text_and_made: tuple[str, set[str]], tags: list[str], shuffle: bool, dropout: float, epoch: int
) -> None:
    rules = CaptionRules(
        trigger="zorb", wildcards=True, shuffle_tags=shuffle, tag_dropout=dropout, prefix="{p|o p},", suffix=", {q|q r}"
    )
    texts = (f"{text_and_made[0]}, {', '.join(tags)}", "x y")

    def words(text: str) -> int:
        return len(re.findall(r"\w+|,", text))

    drawn = rules.caption(texts, seed=5, epoch=epoch, image=0)
    assert max(map(words, rules.longest(texts))) >= words(drawn)
    assert rules.plain(texts) in rules.longest(texts)


def test_nothing_to_say_is_the_trigger_or_nothing() -> None:
    assert CaptionRules(trigger="zorb").caption((), seed=0, epoch=0, image=0) == "zorb"
    assert CaptionRules(trigger="zorb").longest(()) == ("zorb",)
    assert CaptionRules(trigger="", shuffle_tags=True).caption((), seed=0, epoch=0, image=0) == ""


@given(st.text("ab ,zorb", max_size=30))
def test_a_word_that_is_taken_out_leaves_no_loose_commas(caption: str) -> None:
    rest = without_word(caption, "zorb")
    assert not has_word(rest, "zorb") or not has_word(caption, "zorb")
    if has_word(caption, "zorb"):
        assert not re.search(r",\s*,|^\s*,|,\s*$", rest)
