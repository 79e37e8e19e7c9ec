"""Textual inversions: files of A1111 and diffusers, and those that LoRA files bring along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import InversionFileError
from ..families import WORDS_IN_CHUNK
from .hashes import file_hashes
from .lora_file import LoraFile
from .lora_names import is_lora
from .lora_tensors import is_finite
from .tensor_files import PICKLES, mapped_tensors, open_tensor_file

_ONLY = ""
"""Key of the vectors in a file that does not name a text encoder."""
_KEYS = {
    frozenset({"emb_params"}): {"emb_params": _ONLY},
    frozenset({"clip_l"}): {"clip_l": "clip_l"},
    frozenset({"clip_g"}): {"clip_g": "clip_g"},
    frozenset({"clip_l", "clip_g"}): {"clip_l": "clip_l", "clip_g": "clip_g"},
    frozenset({"text_encoders_0", "text_encoders_1"}): {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"},
}
"""Names of the tensors in a file -> name -> text encoder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inversion:
    """Words, and their vectors in the text encoders."""

    path: Path
    words: tuple[str, ...]
    """What prompts call it; the first is the one that A1111 writes into a recipe."""
    vectors: Mapping[str, Tensor]
    """``clip_l``, ``clip_g``, or "" in a file for a base of one text encoder -> (n, width)."""
    sha256: str | None
    """Hash of the whole file; None for one that came with a LoRA."""


def read_inversion(path: Path) -> Inversion:
    """Read a ``.safetensors`` file of A1111 (``emb_params``), SDXL (``clip_l``, ``clip_g``) or diffusers (``<token>``).

    Raises:
        InversionFileError: the file is missing, damaged, a pickle, or of another form; the message says which.
    """
    if path.suffix.lower() in PICKLES:
        raise InversionFileError(
            f"{path}: a pickle, which can run code when it is read; use a .safetensors file instead"
        )
    file = open_tensor_file(path, InversionFileError)
    names = set(file.tensors)
    roles, words = _KEYS.get(frozenset(names)), (path.stem,)
    if roles is None and len(names) == 1 and not is_lora(names):
        (token,) = names
        roles, words = {token: _ONLY}, (path.stem, token.removeprefix("string_to_param.").strip("*") or path.stem)
    if roles is None:
        found = f"{len(names)} tensors, such as {min(names, default='none')}"
        raise InversionFileError(
            f"{path}: holds a LoRA; name it with --lora"
            if is_lora(names)
            else f"{path}: holds {found}; a textual inversion holds emb_params, or clip_l and clip_g, or one tensor with "
            "the name of its token"
        )
    tensor = mapped_tensors(file)
    vectors = {role: _checked(tensor(name), f"{path}: {name}") for name, role in roles.items()}
    return Inversion(path=path, words=tuple(dict.fromkeys(words)), vectors=vectors, sha256=file_hashes(path).sha256)


def bundled_inversions(lora: LoraFile) -> tuple[Inversion, ...]:
    """Those that came with a LoRA: ``bundle_emb.NAME.clip_l``, ``.clip_g``, ``.emb_params`` or ``.string_to_param.*``.

    Raises:
        InversionFileError: one is of another form.
    """
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in lora.bundled.items():
        _, name, role = [*key.split(".", 2), "", ""][:3]
        single = role == "emb_params" or role.startswith("string_to_param")
        if not single and role not in ("clip_l", "clip_g"):
            raise InversionFileError(f"{lora.path}: {key}: expected clip_l, clip_g, emb_params or string_to_param.*")
        grouped.setdefault(name, {})[_ONLY if single else role] = _checked(tensor, f"{lora.path}: {key}")
    return tuple(
        Inversion(path=lora.path, words=(name,), vectors=vectors, sha256=None) for name, vectors in grouped.items()
    )


def _checked(tensor: Tensor, name: str) -> Tensor:
    """(n, width), also of a single vector."""
    vectors = tensor[None] if tensor.ndim == 1 else tensor
    if vectors.ndim != 2 or 0 in vectors.shape or not vectors.is_floating_point():
        raise InversionFileError(f"{name}: shape {tuple(tensor.shape)} of {tensor.dtype}; expected vectors, (n, width)")
    if len(vectors) > WORDS_IN_CHUNK:
        raise InversionFileError(f"{name}: {len(vectors)} vectors; a chunk of a prompt has room for {WORDS_IN_CHUNK}")
    if not is_finite(vectors):
        raise InversionFileError(f"{name}: holds NaN or infinity: its training has failed; use another file")
    return vectors
