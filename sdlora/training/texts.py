"""New texts in the file of a finished run: its metadata change, its tensors do not."""

from __future__ import annotations

from pathlib import Path

from ..config.sections import Config
from ..errors import ResumeError
from ..formats.metadata_file import read_metadata, write_metadata
from .checkpoint import RUN_KEY, RunIdentity, record_run
from .metadata import stated_texts


def changed_metadata(output: Path, config: Config) -> dict[str, str] | None:
    """Metadata of the finished file ``output`` with the texts that ``config`` states; None if it has them already.

    A text that ``config`` leaves out stays as it is.

    Raises:
        ResumeError: ``output.metadata`` is not the level with which the file was written.
    """
    metadata, level = read_metadata(output), config.output.metadata
    earlier = "full" if RUN_KEY in metadata else "minimal" if metadata else "none"
    if level != earlier:
        raise ResumeError(
            f'{output}: output.metadata was "{earlier}", is now "{level}", which a finished file cannot take on; '
            "undo that, choose another output.path, or train again with --restart"
        )
    changed = metadata | stated_texts(config)
    if not config.output.thumbnail:
        changed.pop("modelspec.thumbnail", None)
    return None if changed == metadata else changed


def write_texts(output: Path, metadata: dict[str, str], identity: RunIdentity) -> None:
    """Write ``metadata`` into the finished file ``output``, and its record again where it needs one."""
    write_metadata(output, output, metadata)
    if RUN_KEY not in metadata:
        record_run(output, identity)
