"""The folders in which prompts find what they name: LoRAs of tags, entries of wildcards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .lora_folder import LoraFolder
from .request import ImageRequest
from .tags import TaggedRequest, read_tags
from .wildcards import Wildcards, choose_texts


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptFolders:
    """Where there is no folder, tags and wildcards stay in the prompt."""

    loras: LoraFolder | None = None
    wildcards: Wildcards | None = None

    @classmethod
    def of(cls, loras: str | Path | None, wildcards: str | Path | None) -> PromptFolders:
        """The folders at these paths. Raises ``SdloraError`` where there is none."""
        return cls(
            loras=None if loras is None else LoraFolder(Path(loras)),
            wildcards=None if wildcards is None else Wildcards(Path(wildcards)),
        )

    def read(self, requests: Sequence[ImageRequest]) -> list[TaggedRequest]:
        """Replace alternatives and wildcards of ``requests``, then take out the tags, which an entry may hold too.

        Raises:
            SdloraError: with one line for each alternative, wildcard or tag that cannot be read.
        """
        return read_tags(choose_texts(requests, self.wildcards), self.loras)
