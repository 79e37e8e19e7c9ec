"""The kinds of changes besides the plain low-rank one: LoHa, LoKr, IA³, full differences, GLoRA, OFT, and DoRA over them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .change import Change


def _named_tensors(change: object, names: Mapping[str, str]) -> dict[str, Tensor]:
    """File's name -> tensor, of the fields that are set."""
    found = {name: getattr(change, field) for field, name in names.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _rebuilt(core: Tensor, out: Tensor, inner: Tensor) -> Tensor:
    """Tucker: Σ core[i, j, …] out[i, o] inner[j, n] -> (o, n, …)."""
    return torch.einsum("ij...,io,jn->on...", core, out, inner)


def _is_matrix(shape: tuple[int, ...], outputs: int, inputs: int) -> bool:
    """Whether a weight of ``shape`` is, with all axes after the first as one, an outputs × inputs matrix."""
    return shape[0] == outputs and math.prod(shape[1:]) == inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Hadamard(Change):
    """LoHa: alpha / rank · (A₁ B₁) ⊙ (A₂ B₂) (Hyeon-Woo et al. 2022, eq. 2).

    ``w1_a``, ``w2_a`` are (out, rank), ``w1_b``, ``w2_b`` (rank, in · kh · kw); with Tucker cores ``t1``, ``t2``
    (rank, rank, kh, kw) they are (rank, out) and (rank, in).
    """

    kind = "loha"
    weight_shape = None
    reads_weight = False
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    alpha: float

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        return self._product(weight).reshape(weight.shape)

    def _fits_weight(self, shape: tuple[int, ...]) -> bool:
        if self.t1 is not None and self.t2 is not None:
            return _is_matrix(shape, self.w1_a.shape[1], self.w1_b.shape[1] * math.prod(self.t1.shape[2:]))
        return _is_matrix(shape, self.w1_a.shape[0], self.w1_b.shape[1])

    def norm(self) -> float:
        return float(self._product(torch.zeros(0)).norm())

    def _product(self, like: Tensor) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = (t.to(like) for t in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        if self.t1 is not None and self.t2 is not None:
            product = _rebuilt(self.t1.to(like), w1_a, w1_b) * _rebuilt(self.t2.to(like), w2_a, w2_b)
        else:
            product = (w1_a @ w1_b) * (w2_a @ w2_b)
        return product * (self.alpha / self.rank)

    def tensors(self) -> dict[str, Tensor]:
        names = {"w1_a": "hada_w1_a", "w1_b": "hada_w1_b", "w2_a": "hada_w2_a", "w2_b": "hada_w2_b"}
        return _named_tensors(self, names | {"t1": "hada_t1", "t2": "hada_t2"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Kronecker(Change):
    """LoKr: alpha / rank · W₁ ⊗ W₂, either of which may be a product (Yeh et al. 2023, section 3.3).

    Where neither is a product there is no rank, and alpha does not count.
    """

    kind = "lokr"
    weight_shape = None
    reads_weight = False
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    alpha: float

    @property
    def rank(self) -> int | None:
        inner = self.w1_b if self.w1_b is not None else self.w2_b
        return None if inner is None else inner.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        first, second = self._factors(weight)
        if second.ndim == 4:
            first = first[:, :, None, None]
        return (torch.kron(first, second.contiguous()) * self._scale).reshape(weight.shape)

    def _fits_weight(self, shape: tuple[int, ...]) -> bool:
        first = _product_shape(self.w1, self.w1_a, self.w1_b)
        second = _product_shape(self.w2, self.w2_a, self.w2_b)
        if self.w2 is None and self.t2 is not None and self.w2_a is not None:
            second = (self.w2_a.shape[1], second[1], *self.t2.shape[2:])
        return _is_matrix(shape, first[0] * second[0], math.prod(first[1:]) * math.prod(second[1:]))

    def norm(self) -> float:
        first, second = self._factors(torch.zeros(0))
        return abs(self._scale) * float(first.norm() * second.norm())

    @property
    def _scale(self) -> float:
        return 1.0 if self.rank is None else self.alpha / self.rank

    def _factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        first = self.w1 if self.w1 is not None else _product(self.w1_a, self.w1_b)
        if self.w2 is not None:
            second = self.w2
        elif self.t2 is not None and self.w2_a is not None and self.w2_b is not None:
            second = _rebuilt(self.t2.to(like), self.w2_a.to(like), self.w2_b.to(like))
        else:
            second = _product(self.w2_a, self.w2_b)
        return first.to(like), second.to(like)

    def tensors(self) -> dict[str, Tensor]:
        return _named_tensors(self, {f.name: f"lokr_{f.name}" for f in fields(self) if f.name != "alpha"})


def _product(a: Tensor | None, b: Tensor | None) -> Tensor:
    if a is None or b is None:
        raise ValueError("a product lacks one of its matrices")
    return a.double() @ b.double()


def _product_shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, ...]:
    if whole is not None:
        return tuple(whole.shape)
    if a is None or b is None:
        raise ValueError("a product lacks one of its matrices")
    return (a.shape[0], b.shape[1])


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaling(Change):
    """IA³: each output, or each input, of the module times 1 + v (Liu et al. 2022, section 3.3)."""

    kind = "ia3"
    rank = alpha = weight_shape = None
    weight: Tensor
    """v, (channels,) or (1, channels, 1, 1)."""
    on_input: bool

    def delta(self, weight: Tensor) -> Tensor:
        vector = self.weight.to(weight).reshape(-1)
        axis = 1 if self.on_input else 0
        return weight * vector.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])

    def _fits_weight(self, shape: tuple[int, ...]) -> bool:
        scaled = shape[1:2] if self.on_input else shape[:1]
        return scaled == (self.weight.numel(),)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "on_input": torch.tensor(int(self.on_input))}


@dataclass(frozen=True, kw_only=True, eq=False)
class Full(Change):
    """The change itself: of a whole weight, of a norm, of a bias."""

    kind = "full"
    rank = alpha = None
    reads_weight = False
    diff: Tensor | None = None
    bias: Tensor | None = None
    of_norm: bool = False
    """Whether the file spells it as that of a norm."""

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        return None if self.diff is None else tuple(self.diff.shape)

    def delta(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight) if self.diff is None else self.diff.to(weight).reshape(weight.shape)

    def bias_delta(self) -> Tensor | None:
        return self.bias

    def _fits_weight(self, shape: tuple[int, ...]) -> bool:
        return self.diff is None or super()._fits_weight(shape)

    def norm(self) -> float:
        return 0.0 if self.diff is None else float(self.diff.float().norm())

    def tensors(self) -> dict[str, Tensor]:
        names = ("w_norm", "b_norm") if self.of_norm else ("diff", "diff_b")
        return _named_tensors(self, dict(zip(("diff", "bias"), names, strict=True)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Generalised(Change):
    """GLoRA: alpha / rank · (W A₁ A₂ + B₁ B₂) (Chavan et al. 2023, in the part that changes weights).

    ``a1`` (in, rank), ``a2`` (rank, in), ``b1`` (out, rank), ``b2`` (rank, in[, kh, kw]).
    """

    kind = "glora"
    weight_shape = None
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.b2.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        a1, a2, b1, b2 = (t.to(weight).flatten(1) for t in (self.a1, self.a2, self.b1, self.b2))
        turned = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
        return (turned + (b1 @ b2).reshape(weight.shape)) * (self.alpha / self.rank)

    def _fits_weight(self, shape: tuple[int, ...]) -> bool:
        inputs = self.a1.shape[0]
        return shape[1:2] == (inputs,) and _is_matrix(shape, self.b1.shape[0], math.prod(self.b2.shape[1:]))

    def tensors(self) -> dict[str, Tensor]:
        return {f"{name}.weight": getattr(self, name) for name in ("a1", "a2", "b1", "b2")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Orthogonal(Change):
    """OFT and BOFT as LyCORIS has them: blocks of outputs turned by (I + Q)(I - Q)⁻¹, Q = S - Sᵀ (Qiu et al. 2023, eq. 4).

    ``blocks`` S is (count, b, b), or (stages, count, b, b) for the butterfly of BOFT (Liu et al. 2023, section 4). Where
    ``turned``, they are the rotations themselves, as LyCORIS wrote them at first.
    """

    kind = "oft"
    rank = weight_shape = None
    blocks: Tensor
    turned: bool = False
    rescale: Tensor | None = None
    """(out, 1[, 1, 1]), times the turned weight."""
    alpha: float
    """The constraint: ‖Q‖ is at most alpha times the number of outputs; 0 is none."""

    def delta(self, weight: Tensor) -> Tensor:
        turns = self._turns(weight)
        result = weight
        if self.blocks.ndim == 3:
            count, size, _ = turns.shape
            result = torch.einsum("knm,kn...->km...", turns, weight.unflatten(0, (count, size))).flatten(0, 1)
        else:
            size = turns.shape[-1]
            for stage, turn in enumerate(turns):
                reach = 2**stage * (size // 2)
                mixed = result.unflatten(0, (-1, 2, reach)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
                mixed = torch.einsum("bij,bj...->bi...", turn, mixed).flatten(0, 1)
                result = mixed.unflatten(0, (-1, reach, 2)).transpose(1, 2).flatten(0, 2)
        if self.rescale is not None:
            result = result * self.rescale.to(weight).reshape([-1] + [1] * (weight.ndim - 1))
        return result - weight

    def _fits_weight(self, shape: tuple[int, ...]) -> bool:
        count, size, _ = self.blocks.shape[-3:]
        if self.rescale is not None and self.rescale.numel() != shape[0]:
            return False
        if self.blocks.ndim == 3:
            return shape[0] == count * size
        last_reach = 2 ** (self.blocks.shape[0] - 1) * (size // 2)
        return shape[0] == count * size and last_reach > 0 and shape[0] % (2 * last_reach) == 0

    def _turns(self, weight: Tensor) -> Tensor:
        blocks = self.blocks.to(weight)
        if self.turned:
            return blocks
        skew = blocks - blocks.transpose(-1, -2)
        limit = self.alpha * weight.shape[0]
        if limit > 0:
            length = skew.norm() + 1e-8
            skew = skew * (limit / length).clamp(max=1.0)
        eye = torch.eye(skew.shape[-1], dtype=weight.dtype, device=weight.device)
        return (eye + skew) @ torch.linalg.inv(eye - skew)

    def tensors(self) -> dict[str, Tensor]:
        return _named_tensors(self, {"blocks": "oft_diag" if self.turned else "oft_blocks", "rescale": "rescale"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Decomposed(Change):
    """DoRA: m · (W + ΔW) / ‖W + ΔW‖ - W (Liu et al. 2024, eq. 5), over another kind's ΔW.

    ``magnitude`` m has one number for each output, (out, 1[, 1, 1]), or each input, (1, in[, 1, 1]): the norm is taken
    over all other axes.
    """

    inner: Change
    magnitude: Tensor

    @property
    def kind(self) -> str:
        return "dora" if self.inner.kind == "lora" else f"dora-{self.inner.kind}"

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def alpha(self) -> float | None:
        return self.inner.alpha

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        return self.inner.weight_shape

    def delta(self, weight: Tensor) -> Tensor:
        changed = weight + self.inner.delta(weight)
        by_input = self.magnitude.ndim > 1 and self.magnitude.shape[0] == 1 and self.magnitude.shape[1] != 1
        axis = 1 if by_input else 0
        norms = torch.linalg.vector_norm(changed, dim=[i for i in range(changed.ndim) if i != axis], keepdim=True)
        norms = norms.clamp(min=torch.finfo(torch.float32).eps)  # Where all is zero, nothing changes.
        return changed * (self.magnitude.to(weight).reshape(norms.shape) / norms) - weight

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.inner.fits(shape) and self.magnitude.numel() in shape[:2]

    def bias_delta(self) -> Tensor | None:
        return self.inner.bias_delta()

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), "dora_scale": self.magnitude}
