"""A folder of LoRAs, in which tags of prompts find theirs: by file name, by the name in the metadata, or by a hash."""

from __future__ import annotations

import difflib
import re
from functools import cached_property
from pathlib import Path

from ..errors import LoraFileError
from ..formats.hashes import file_hashes
from ..formats.safetensors_header import read_metadata
from ..formats.tensor_files import PICKLES

_ENDINGS = (".safetensors", *PICKLES)
_HASH = re.compile(r"(?:0x)?([0-9a-fA-F]{8,64})")
_NAMED = 3


class LoraFolder:
    """The LoRA files in a folder and the folders in it, looked up when the first tag is."""

    def __init__(self, folder: Path):
        """Raises ``LoraFileError`` where there is no such folder."""
        if not folder.is_dir():
            raise LoraFileError(f"{folder}: no such folder of LoRAs")
        self.folder = folder

    def find(self, name: str) -> Path:
        """The file that ``<lora:NAME:1>`` means: of that name, else of that ``ss_output_name``, else of that hash.

        A name may also have the folders above the file in it, and its ending. Without folders, a file in the folder itself
        goes before those further down. Capital letters count only where two names
        differ by nothing else.

        Raises:
            LoraFileError: there is no such file, or there are several.
        """
        for found in (
            [file for file in self._files if name in self._paths_of(file)][:1],
            [file for file in self._files if name in self._names_of(file)],
            [file for file in self._files if name.casefold() in map(str.casefold, self._names_of(file))],
            [file for file in self._files if self._alias(file) == name],
            # Files of one hash are copies of each other.
            [file for file in self._files if self._has_hash(file, name)][:1],
        ):
            if len(found) > 1:
                paths = " and ".join(file.relative_to(self.folder).as_posix() for file in found[:_NAMED])
                raise LoraFileError(
                    f"{name} is the name of {len(found)} files in {self.folder}: {paths}; name the folder too"
                )
            if found:
                return found[0]
        near = difflib.get_close_matches(name, [file.stem for file in self._files], _NAMED, 0.5)
        nearest = f"; did you mean {' or '.join(near)}?" if near else ""
        raise LoraFileError(f"{name}: no LoRA of this name or hash in {self.folder}{nearest}")

    @cached_property
    def _files(self) -> list[Path]:
        return sorted(file for file in self.folder.rglob("*") if file.suffix in _ENDINGS and file.is_file())

    def _paths_of(self, file: Path) -> tuple[str, ...]:
        path = file.relative_to(self.folder)
        return (path.as_posix(), path.with_suffix("").as_posix())

    def _names_of(self, file: Path) -> tuple[str, ...]:
        return (file.stem, file.name, *self._paths_of(file))

    @cached_property
    def _metadata(self) -> dict[Path, dict[str, str]]:
        found = {}
        for file in self._files:
            try:
                found[file] = read_metadata(file, LoraFileError) if file.suffix == ".safetensors" else {}
            except LoraFileError:
                # A damaged file that nothing has named.
                found[file] = {}
        return found

    def _alias(self, file: Path) -> str | None:
        return self._metadata[file].get("ss_output_name")

    def _has_hash(self, file: Path, name: str) -> bool:
        """Whether ``name`` is how a hash of the file begins: over all of it (AutoV2), or over its tensors (AutoV3)."""
        match = _HASH.fullmatch(name)
        if match is None:
            return False
        hashes = file_hashes(file)
        return any(known.startswith(match[1].lower()) for known in (hashes.sha256, hashes.payload_sha256 or ""))
