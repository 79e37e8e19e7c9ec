"""What one header says: the facts of its table, which many files share, and those of its metadata."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import LoraFileError
from ..formats.lora_family import stated_family
from ..formats.metadata import stated_tags, trigger_words
from ..formats.safetensors_header import check_payload, read_raw_header, read_table, split_header
from .facts import TableFacts, facts_of
from .scan import FoundFile

_TAGS_SEARCHED = 100
_BASES = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
"""Keys that state the base, the most exact first."""
_CARD_BYTES = 1 << 20
"""A larger file beside a LoRA is no card of A1111."""


@dataclass(frozen=True, kw_only=True)
class HeaderFacts:
    """What the metadata of a file say, and the card beside it."""

    alias: str | None
    title: str | None
    family: str | None
    """As the metadata state it."""
    made_for: str | None
    trigger: tuple[str, ...]
    stated_autov3: str | None

    def to_json(self) -> dict[str, Any]:
        """All fields by their names."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> HeaderFacts:
        """The inverse of ``to_json``. Raises ``TypeError`` or ``KeyError`` where fields are missing or unknown."""
        given: dict[str, Any] = {**fields, "trigger": tuple(fields["trigger"])}
        return cls(**given)


class HeaderReader:
    """Reads headers; a table of tensors that occurred before is not parsed again."""

    def __init__(self, known: Mapping[str, TableFacts]):
        """``known``: digest of a table -> what it shows."""
        self.tables: dict[str, TableFacts] = dict(known)

    def read(self, found: FoundFile) -> tuple[str, HeaderFacts, str]:
        """The digest of the file's table, which is among ``tables`` afterwards; what its metadata say; its words.

        Searches look at the words, a line each in lower case: names of the file and its folder, title, trigger, base, tags.

        Raises:
            LoraFileError: it is damaged, or not a safetensors file.
        """
        path = Path(found.path)
        raw = read_raw_header(path, LoraFileError)
        split = split_header(raw)
        metadata, text = split or (None, memoryview(raw.text))
        digest = hashlib.blake2b(text, digest_size=16).hexdigest()
        if split is None or digest not in self.tables:
            table = read_table(path, raw, LoraFileError)
            self.tables[digest], metadata = facts_of(table), table.metadata
        else:
            check_payload(path, raw, self.tables[digest].payload_bytes, LoraFileError)
        facts = _facts(found, metadata or {})
        tags = list(stated_tags(metadata or {}))[:_TAGS_SEARCHED]
        more = (facts.alias, facts.title, facts.made_for, *facts.trigger, *tags)
        return digest, facts, "\n".join([*names_of(path), *(word for word in more if word)]).casefold()


def names_of(path: Path) -> tuple[str, str]:
    """Where searches look even in a file that cannot be read: its name, and that of its folder."""
    return path.name, path.parent.name


def _facts(found: FoundFile, metadata: Mapping[str, str]) -> HeaderFacts:
    family = stated_family(metadata)
    alias = metadata.get("ss_output_name", "").strip() or None
    title = metadata.get("modelspec.title", "").strip() or None
    stated = (metadata.get(key, "").strip() for key in _BASES)
    made_for = next((value for value in stated if value), None)
    trigger = trigger_words(metadata) or _card_trigger(found.card)
    digest = (metadata.get("sshs_model_hash") or metadata.get("modelspec.hash_sha256", "")).lower().removeprefix("0x")
    return HeaderFacts(
        alias=alias,
        title=title,
        family=family.name if family else None,
        made_for=made_for,
        trigger=trigger,
        stated_autov3=digest[:12] if re.fullmatch(r"[0-9a-f]{64}", digest) else None,
    )


def _card_trigger(card: str | None) -> tuple[str, ...]:
    """The ``activation text`` of A1111's card; () where there is none."""
    if card is None:
        return ()
    try:
        with open(card, encoding="utf-8") as file:
            text = json.loads(file.read(_CARD_BYTES))["activation text"]
        return tuple(word.strip() for word in text.split(",") if word.strip())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()
