"""Nested state of an optimizer as tensors by name and JSON, exactly, and back."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(tree: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor within dictionaries, lists, tuples and queues, with its place."""
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, (dict, list, tuple, deque)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors_in(value, f"{place}.{key}")


def packed(tree: Any, name: str, device: torch.device) -> dict[str, Tensor]:
    """``tree`` as tensors: those within it, by ``name`` and their places, and ``name``.json, uint8, for the rest.

    Raises:
        TypeError: it holds an object that is neither a tensor nor data.
    """
    text = json.dumps(_described(tree, name, device))
    return {place: tensor.detach() for place, tensor in tensors_in(tree, name)} | {
        f"{name}.json": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    }


def unpacked(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> Any:
    """The inverse of ``packed``, of copies on ``device``; those that were beside it, as counts of steps may be, on the CPU.

    Raises:
        KeyError: something is missing.
    """
    text = bytes(tensors[f"{name}.json"].cpu().tolist()).decode()
    return _built(json.loads(text), tensors, device)


def _described(tree: Any, place: str, device: torch.device) -> Any:
    """As JSON, which has exact floats; containers and tensors as objects that name their kind."""
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, Tensor):
        return {"kind": "tensor", "name": place, "beside": tree.device != device}
    if isinstance(tree, torch.dtype):
        return {"kind": "dtype", "name": str(tree).removeprefix("torch.")}
    if isinstance(tree, dict):
        entries = [[key, _described(value, f"{place}.{key}", device)] for key, value in tree.items()]
        return {"kind": "dict", "entries": entries}
    if isinstance(tree, (list, tuple, deque)):
        kind = next(kind for kind in (list, tuple, deque) if isinstance(tree, kind))
        entries = [_described(value, f"{place}.{number}", device) for number, value in enumerate(tree)]
        return {"kind": kind.__name__, "entries": entries, "length": getattr(tree, "maxlen", None)}
    raise TypeError(f"{place} is a {type(tree).__name__}")


def _built(described: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if not isinstance(described, dict):
        return described
    kind = described["kind"]
    if kind == "tensor":
        return tensors[described["name"]].to("cpu" if described["beside"] else device).clone()
    if kind == "dtype":
        return getattr(torch, described["name"])
    if kind == "dict":
        return {key: _built(value, tensors, device) for key, value in described["entries"]}
    entries = [_built(value, tensors, device) for value in described["entries"]]
    return deque(entries, described["length"]) if kind == "deque" else {"list": list, "tuple": tuple}[kind](entries)
