"""Which modules are trained, and at which rank, alpha and learning rate."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdlora.base.checkpoint import find_base
from sdlora.config.loading import load_config
from sdlora.config.sections import Config
from sdlora.errors import ConfigError
from sdlora.formats.keys import kohya_keys
from sdlora.formats.readers import lost_elsewhere
from sdlora.lora.patterns import matches, near_misses
from sdlora.lora.targets import choose_targets, chosen_names
from sdlora.training.module_choice import ModuleChoice, changeable_shapes, choose_modules
from sdlora.training.new_adapter import RateGroup, new_adapter
from sdlora.training.plan import plan_config
from tests.tiny import opened

BLOCK = "unet.down_blocks.0.attentions.0"
ATTENTION = [f"{BLOCK}.transformer_blocks.0.{a}.{p}" for a in ("attn1", "attn2") for p in ("to_k", "to_q")]
SHAPES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(ATTENTION, (32, 32)),
    f"{BLOCK}.transformer_blocks.0.ff.net.2": (32, 128),
    f"{BLOCK}.transformer_blocks.0.norm1": (32,),
    f"{BLOCK}.proj_in": (32, 32, 1, 1),
    "unet.down_blocks.0.resnets.0.conv1": (32, 32, 3, 3),
    "unet.down_blocks.0.resnets.0.conv_shortcut": (32, 32, 1, 1),
    "unet.down_blocks.0.resnets.0.time_emb_proj": (32, 64),
    "unet.time_embedding.linear_1": (64, 16),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (16, 16),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (64, 16),
}
TEXT = [name for name in SHAPES if name.startswith("text")]


def configured(*more: str) -> Config:
    return load_config(None, ["data.images=x", "data.trigger=zorb", "output.path=x.safetensors", *more])


def rules(*tables: dict[str, object]) -> str:
    return f"lora.rules=[{', '.join('{' + ', '.join(f'{k} = {json.dumps(v)}' for k, v in t.items()) + '}' for t in tables)}]"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("attention", [*ATTENTION, TEXT[0]]),
        ("attention-mlp", [*ATTENTION, f"{BLOCK}.transformer_blocks.0.ff.net.2", *TEXT]),
        ("linear", [n for n, s in SHAPES.items() if len(s) == 2 or n.endswith("proj_in")]),
        ("all", [n for n, s in SHAPES.items() if len(s) != 1]),
        (("unet.*.attn2.to_k",), [ATTENTION[2]]),
        (("unet.down_blocks.0.resnets", "text_encoder"), [n for n in SHAPES if ".resnets." in n] + TEXT[:1]),
        (("unet.*.attn[2].to_?", "unet.*.norm1"), ATTENTION[2:]),
    ],
)
def test_targets(targets: str | tuple[str, ...], expected: list[str]) -> None:
    assert chosen_names(SHAPES, targets) == sorted(expected)


def spelled(pattern: str) -> re.Pattern[str]:
    """What ``matches`` must mean, written by hand: no brackets."""
    body = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern)
    return re.compile(rf"{body}(\..*)?", re.DOTALL)


NAMES = st.sampled_from(sorted(SHAPES))
PATTERNS = st.one_of(
    st.text("unet.*?_01ak", min_size=1, max_size=12),
    st.builds(
        lambda name, i, j: name[: min(i, j)] + "*" + name[max(i, j) :], NAMES, st.integers(0, 60), st.integers(0, 60)
    ),
    st.builds(lambda name, i: ".".join(name.split(".")[:i]), NAMES, st.integers(1, 8)),
)


@given(PATTERNS, NAMES)
def test_a_pattern_means_what_a_shell_means_and_all_that_is_within(pattern: str, name: str) -> None:
    assert matches(pattern, name) == bool(spelled(pattern).fullmatch(name))


@given(PATTERNS)
@settings(max_examples=30)
def test_near_misses_match_something(pattern: str) -> None:
    for near in near_misses(pattern, SHAPES):
        assert any(matches(near, name) for name in SHAPES)


def test_near_misses_correct_one_part() -> None:
    assert near_misses("unet.*.attn2.tok", SHAPES)[0] == "unet.*.attn2.to_k"
    assert near_misses("unet.up_blocks.0", SHAPES)[0] == "unet.down_blocks.0"
    assert near_misses("unet.down_blocks.3.*", SHAPES)[0] == "unet.down_blocks.0.*"
    assert "text_encoder" in near_misses("textencoder", SHAPES)


TABLES = st.fixed_dictionaries(
    {"pattern": st.sampled_from(["unet", "text_encoder", "unet.*.attn1", "unet.*.attn2.to_k", "*.to_q", "*"])},
    optional={
        "rank": st.integers(1, 9), "alpha": st.sampled_from([1.0, 2.5]), "learning_rate": st.sampled_from([1e-5, 2e-3]),
        "train": st.booleans(),
    },
).filter(lambda table: len(table) > 1)  # fmt: skip


@given(st.lists(TABLES, max_size=5))
@settings(max_examples=60, deadline=None)
def test_later_rules_win(tables: list[dict[str, object]]) -> None:
    base = find_base("mini")
    config = configured("optimizer.text_encoder_learning_rate=1e-4", rules(*tables))
    chosen = choose_modules(base, config)
    for name in chosen_names(base.module_shapes(), "attention"):
        values = {"rank": 16, "alpha": 8.0, "learning_rate": 3e-4 if name.startswith("unet") else 1e-4, "train": True}
        for table in tables:
            if spelled(str(table["pattern"])).fullmatch(name):
                values |= {key: value for key, value in table.items() if key != "pattern"}
        expected = ModuleChoice(rank=values["rank"], alpha=values["alpha"], rate=values["learning_rate"])
        assert chosen.get(name) == (expected if values["train"] else None)


def problems(base: Path, images: Path, *more: str) -> list[str]:
    needed = [f"base.path={base}", f"data.images={images}", "data.trigger=zorb", "output.path=x.safetensors"]
    with pytest.raises(ConfigError) as caught:
        plan_config(load_config(None, [*needed, "data.resolution=64", *more]))
    return list(caught.value.problems)


def test_all_that_does_not_fit_the_base_is_said_at_once(tiny_base: Path, images: Path) -> None:
    tables = rules(
        {"pattern": "unet.*.attn3", "rank": 4},
        {"pattern": "unet.*.ff", "rank": 4},
        {"pattern": "text_encoder", "rank": 4},
        {"pattern": "unet.*.attn1", "rank": 4},
    )
    found = problems(
        tiny_base, images, 'lora.targets=["unet.*.tok", "unet.*.attn1", "text_encoder"]', tables,
        "optimizer.text_encoder_learning_rate=0",
    )  # fmt: skip
    assert found[0].startswith(
        'lora.targets: pattern "unet.*.tok" matches no linear layer or convolution of the base; did'
    )
    assert "unet.*.to_k" in found[0]
    assert found[1].startswith('lora.rules, number 1: pattern "unet.*.attn3" matches no')
    assert re.fullmatch(
        r'lora\.rules, number 2: pattern "unet\.\*\.ff" matches 8 modules, such as unet\.down_\S+, but lora\.targets .*',
        found[2],
    )
    assert "number 3" in found[3]
    assert "the text encoder, which is not trained (its learning rate is 0)" in found[3]
    assert len(found) == 4


def test_a_run_of_nothing_is_refused(tiny_base: Path, images: Path) -> None:
    (problem,) = problems(tiny_base, images, rules({"pattern": "*", "train": False}))
    assert "nothing would be trained" in problem


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora.targets=attn", 'must be "attention", "attention-mlp", "linear", "all", or patterns'),
        ("lora.targets=[]", 'must be "attention"'),
        (rules({"pattern": "unet"}), "lora.rules.pattern has no rank, alpha, learning_rate or train beside it"),
        (rules({"pattern": "unet", "rank": 0}), "lora.rules.rank = 0: must be at least 1"),
        (rules({"pattern": "unet", "dim": 4}), "unknown key lora.rules.dim"),
        ("optimizer.text_encoder_learning_rate=[1e-4, 2]", "must be a number from 0 to 1, or one for each"),
        ("optimizer.lora_plus_ratio=0", "optimizer.lora_plus_ratio = 0: must be more than 0"),
        ("lora.init=svd", "lora.init = 'svd': must be 'default', 'gaussian', 'pissa' or 'orthogonal'"),
    ],
)
def test_wrong_values_are_answered(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        configured(setting)


def groups(base: Path, images: Path, *more: str) -> list[tuple[str, float, int]]:
    """Part, rate and number of values of each group of a new adapter."""
    needed = [f"base.path={base}", f"data.images={images}", "data.trigger=zorb", "output.path=x.safetensors"]
    plan = plan_config(load_config(None, [*needed, "data.resolution=64", "lora.rank=4", *more]))
    adapter = new_adapter(opened(base), plan.config)
    return [(g.part, g.rate, p.numel()) for g, p in zip(adapter.groups, adapter.parameters, strict=True)]


def test_lora_plus_raises_the_rate_of_the_up_matrices(tiny_base: Path, images: Path) -> None:
    plain = groups(tiny_base, images)
    plus = groups(tiny_base, images, "optimizer.lora_plus_ratio=16")
    assert [(part, rate) for part, rate, _ in plain] == [("unet", 3e-4), ("text_encoder", 5e-5)]
    assert {(part, rate) for part, rate, _ in plus} == {
        ("unet", 3e-4), ("unet", 16 * 3e-4), ("text_encoder", 5e-5), ("text_encoder", 16 * 5e-5),
    }  # fmt: skip
    shapes = find_base(str(tiny_base)).module_shapes()
    ups = sum(4 * shapes[name][0] for name in chosen_names(shapes, "attention") if name.startswith("unet."))
    assert {size for part, rate, size in plus if (part, rate) == ("unet", 16 * 3e-4)} == {ups}


def test_rules_make_groups_of_their_rates(tiny_base: Path, images: Path) -> None:
    table = {"pattern": "unet.*.attn2", "learning_rate": 1e-3}
    assert {(part, rate) for part, rate, _ in groups(tiny_base, images, rules(table))} == {
        ("unet", 3e-4), ("unet", 1e-3), ("text_encoder", 5e-5),
    }  # fmt: skip


def test_sdxl_has_a_rate_for_each_text_encoder(tiny_files: dict[str, Path], images: Path) -> None:
    sdxl, setting = tiny_files["sdxl"], "optimizer.text_encoder_learning_rate"
    rates = {part: rate for part, rate, _ in groups(sdxl, images, f"{setting}=[5e-5, 1e-5]")}
    assert rates == {"unet": 3e-4, "text_encoder": 5e-5, "text_encoder_2": 1e-5}
    assert [part for part, *_ in groups(sdxl, images, f"{setting}=[0, 1e-5]")] == ["unet", "text_encoder_2"]
    (problem,) = problems(tiny_files["sd1"], images, f"{setting}=[5e-5, 1e-5]")
    assert problem.endswith(
        "= [5e-05, 1e-05]: Stable Diffusion 1.x has 1 text encoder; state one number, or one for each"
    )
    alike = [f"{setting}=[5e-5, 5e-5]", f"{setting}=5e-5"]
    assert groups(sdxl, images, alike[0]) == groups(sdxl, images, alike[1])


def test_text_encoders_without_a_module_are_frozen(tiny_base: Path, images: Path) -> None:
    needed = [f"base.path={tiny_base}", f"data.images={images}", "data.trigger=zorb", "output.path=x.safetensors"]
    plan = plan_config(load_config(None, [*needed, "data.resolution=64", 'lora.targets=["unet.*.attn2"]']))
    assert plan.config.optimizer.text_encoder_learning_rate == 0
    assert new_adapter(opened(tiny_base), plan.config).groups == (RateGroup(part="unet", rate=3e-4),)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_reader_knows_the_names_of_every_target(family: str, tiny_files: dict[str, Path]) -> None:
    base = find_base(str(tiny_files[family]))
    shapes = changeable_shapes(base)
    linear, every = chosen_names(shapes, "linear"), chosen_names(shapes, "all")
    assert lost_elsewhere(kohya_keys(every, base.family, shapes).values(), base.family) == {}
    modules = opened(tiny_files[family]).modules()
    kinds = {name: type(module) for name, module in modules.items()}
    assert {name for name in every if "conv" not in name} >= set(linear)
    assert set(every) == {name for name, kind in kinds.items() if kind in (nn.Linear, nn.Conv2d)}
    around = {name for name in every if name.endswith(("proj_in", "proj_out"))}
    assert set(linear) == {name for name, kind in kinds.items() if kind is nn.Linear} | around
    assert around
    assert {kinds[name] for name in around} == {nn.Conv2d if family == "sd1" else nn.Linear}
    for preset in ("attention", "attention-mlp", "linear", "all"):
        assert sorted(choose_targets(modules, preset)) == chosen_names(shapes, preset)
