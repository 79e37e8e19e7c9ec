"""The mathematics of merging and resizing against float64 formulas and PEFT's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdlora.lora.combining import Cut, Spectrum, inner_product, joined, overlap, plain
from sdlora.lora.low_rank import LowRank
from sdlora.lora.task_arithmetic import dare, mean, ties
from sdlora.tools.merge import in_dtype

SHAPES = st.sampled_from([(7, 9), (9, 7), (6, 5, 3, 3), (12, 2, 3, 3), (5, 5, 1, 1)])


def low_rank(shape: tuple[int, ...], rank: int, seed: int, alpha: float = 3.0) -> LowRank:
    drawn = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=drawn)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=drawn)
    return LowRank(down=down, up=up, alpha=alpha)


def exact(pairs: list[tuple[LowRank, float]], shape: tuple[int, ...]) -> torch.Tensor:
    """Σ w · alpha / rank · up @ down, in float64."""
    total = torch.zeros(shape, dtype=torch.float64)
    for change, strength in pairs:
        product = change.up.double().flatten(1) @ change.down.double().flatten(1)
        total += strength * change.alpha / change.down.shape[0] * product.reshape(shape)
    return total


def delta(change: LowRank, shape: tuple[int, ...]) -> torch.Tensor:
    return change.delta(torch.zeros(shape, dtype=torch.float64))


@given(SHAPES, st.lists(st.tuples(st.integers(1, 6), st.floats(-2, 2)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_joined_changes_are_their_sum(shape: tuple[int, ...], ranks: list[tuple[int, float]]) -> None:
    pairs = [(low_rank(shape, rank, seed, alpha=rank / 3), weight) for seed, (rank, weight) in enumerate(ranks)]
    merged = joined(pairs, shape)
    assert (merged.rank, merged.weight_shape) == (sum(rank for rank, _ in ranks), shape)
    torch.testing.assert_close(delta(merged, shape), exact(pairs, shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 48), (32, 16, 3, 3)])
def test_float16_holds_a_joined_change_with_all_its_bits(shape: tuple[int, ...]) -> None:
    """Alpha 1 at rank 128, and weights far apart: with the scales in ``up`` alone 3 % were lost."""
    pairs = [(low_rank(shape, rank, rank, alpha=1.0), strength) for rank, strength in ((128, 0.3), (4, 1e-4), (2, 1.0))]
    pairs = [(replace(change, down=change.down.half(), up=(1e-3 * change.up).half()), w) for change, w in pairs]
    pairs.append((replace(pairs[-1][0], up=torch.zeros_like(pairs[-1][0].up)), 1.0))
    made = in_dtype(joined(pairs, shape), torch.float16)
    expected = exact(pairs, shape)
    assert (delta(made, shape) - expected).norm() < 2.0**-11 * expected.norm()
    # Each by itself: the one with a small weight too.
    for change, weight in pairs[:3]:
        alone = in_dtype(joined([(change, weight)], shape), torch.float16)
        expected = exact([(change, weight)], shape)
        assert (delta(alone, shape) - expected).norm() < 2.0**-11 * expected.norm()


@given(SHAPES, st.integers(1, 6), st.integers(1, 8))
@settings(deadline=None, max_examples=40)
def test_a_cut_is_the_closest_change_of_its_rank(shape: tuple[int, ...], rank: int, kept: int) -> None:
    pairs = [(low_rank(shape, rank, 1), 0.7), (low_rank(shape, 2, 2), -1.0)]
    whole = exact(pairs, shape)
    left, values, right = torch.linalg.svd(whole.flatten(1), full_matrices=False)
    best = ((left[:, :kept] * values[:kept]) @ right[:kept]).reshape(shape)
    for spectrum in (Spectrum.of_product(pairs, shape), Spectrum.of_matrix(whole)):
        cut = spectrum.cut(Cut(rank=kept))
        count = min(kept, int((values > 1e-7 * values[0]).sum()))
        assert (cut.rank, cut.alpha) == (count, float(count))
        torch.testing.assert_close(delta(cut, shape), best, rtol=0, atol=1e-5)
        share = float(values[:count].square().sum() / values.square().sum())
        assert spectrum.energy(count) == pytest.approx(share, abs=1e-9)


def test_limits_of_a_cut() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    assert Cut().kept(values) == 4
    assert Cut(rank=2).kept(values) == 2
    assert Cut(energy=16 / 21.25).kept(values) == 1
    assert Cut(energy=16.01 / 21.25).kept(values) == 2
    assert Cut(energy=1.0).kept(values) == 4
    assert Cut(ratio=4.0).kept(values) == 3
    assert Cut(rank=3, energy=0.999, ratio=2.0).kept(values) == 2
    assert Cut(rank=3).kept(torch.zeros(4)) == 1


def test_products_and_overlaps_of_changes() -> None:
    shape = (9, 7)
    one, other = low_rank(shape, 2, 1), low_rank(shape, 3, 2)
    expected = (exact([(one, 1.0)], shape) * exact([(other, 1.0)], shape)).sum()
    assert inner_product(one, other) == pytest.approx(float(expected), rel=1e-9)
    same = LowRank(down=one.down, up=torch.randn(9, 2), alpha=1.0)
    spectra = [Spectrum.of_product([(change, 1.0)], shape) for change in (one, same)]
    assert overlap(spectra[0], spectra[1], of="inputs") == pytest.approx(1.0, abs=1e-6)
    assert overlap(spectra[0], spectra[1], of="outputs") < 0.99


def test_a_core_is_multiplied_out() -> None:
    core = LowRank(down=torch.randn(2, 5, 1, 1), up=torch.randn(6, 3, 1, 1), mid=torch.randn(3, 2, 3, 3), alpha=2.0)
    product = plain(core)
    assert product is not None
    up, down = core.up[..., 0, 0].double(), core.down[..., 0, 0].double()
    assert core.mid is not None
    expected = torch.einsum("om,mnkl,ni->oikl", up, core.mid.double(), down) * core.alpha / 2
    torch.testing.assert_close(delta(product, (6, 5, 3, 3)), expected, rtol=0, atol=1e-5)


def test_ties_is_that_of_peft() -> None:
    from peft.utils.merge_utils import ties as theirs

    deltas = [torch.randn(8, 9, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    weights = [0.7, 0.7, 0.7]
    expected = theirs(deltas, torch.tensor(weights), 0.4)
    found = ties(list(zip(deltas, weights, strict=True)), density=0.4)
    assert found.count_nonzero() == expected.count_nonzero()
    torch.testing.assert_close(found, expected)


def test_the_mean_is_weighted() -> None:
    deltas = [(torch.full((2, 2), 1.0), 1.0), (torch.full((2, 2), 5.0), 3.0)]
    assert torch.equal(mean(deltas), torch.full((2, 2), 4.0))


def test_dare_keeps_a_share_and_its_expectation() -> None:
    change = torch.ones(200, 200)
    found = dare([(change, 2.0)], density=0.25, rng=np.random.default_rng(0))
    assert set(found.unique().tolist()) == {0.0, 8.0}
    assert float(found.mean()) == pytest.approx(2.0, rel=0.03)
    again = dare([(change, 2.0)], density=0.25, rng=np.random.default_rng(0))
    assert torch.equal(found, again)


def test_concatenation_and_svd_are_those_of_peft() -> None:
    """``add_weighted_adapter`` of a real PEFT model, two adapters of other ranks and alphas."""
    from peft import LoraConfig, get_peft_model

    def config(rank: int, alpha: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)

    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(9, 7)), config(2, 3), adapter_name="one")
    model.add_adapter("two", config(4, 2))
    layer = model.base_model.model[0]
    pairs = []
    for name, weight in (("one", 0.5), ("two", 1.2)):
        alpha = layer.scaling[name] * layer.r[name]
        change = LowRank(down=layer.lora_A[name].weight.data, up=layer.lora_B[name].weight.data, alpha=alpha)
        pairs.append((change, weight))
    model.add_weighted_adapter(["one", "two"], [0.5, 1.2], "cat", combination_type="cat")
    torch.testing.assert_close(
        delta(joined(pairs, (7, 9)), (7, 9)).float(), layer.get_delta_weight("cat").detach(), rtol=0, atol=1e-5
    )
    model.add_weighted_adapter(["one", "two"], [0.5, 1.2], "svd", combination_type="svd", svd_rank=3, svd_clamp=None)
    cut = Spectrum.of_product(pairs, (7, 9)).cut(Cut(rank=3))
    torch.testing.assert_close(delta(cut, (7, 9)).float(), layer.get_delta_weight("svd").detach(), rtol=0, atol=1e-4)
