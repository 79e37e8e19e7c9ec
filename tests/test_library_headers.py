"""Tables of tensors read fast are those that the JSON parser reads, and what is wrong with one is found all the same."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdlora.errors import LoraFileError
from sdlora.formats import safetensors_header
from sdlora.formats.lora_family import family_of_shapes
from sdlora.formats.safetensors_header import TensorForm, parse_header, read_raw_header, read_table, split_header
from sdlora.library.facts import facts_of, facts_of_names

FOREIGN = sorted((Path(__file__).parent / "foreign").glob("*.safetensors"))


def is_plain(file: Path) -> bool:
    split = split_header(read_raw_header(file, LoraFileError))
    return split is not None and safetensors_header._plain_table(split[1]) is not None


def with_metadata(source: Path, to: Path) -> Path:
    """The tensors of ``source`` as safetensors itself writes them beside metadata, which not all of the files have."""
    with safe_open(source, "pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys()}, to, metadata={"a": "b"})  # noqa: SIM118
    return to


@pytest.mark.parametrize("source", FOREIGN, ids=lambda file: file.stem)
def test_a_table_read_fast_is_the_one_that_is_parsed(source: Path, tmp_path: Path) -> None:
    for file in (source, with_metadata(source, tmp_path / "written.safetensors")):
        raw = read_raw_header(file, LoraFileError)
        table, (entries, metadata) = read_table(file, raw, LoraFileError), parse_header(file, raw, LoraFileError)
        parsed = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        assert {name: (form.dtype, form.shape) for name, form in table.tensors.items()} == parsed
        assert list(table.tensors) == list(parsed)
        assert (table.metadata, table.payload_bytes) == (metadata, raw.payload_bytes)
    assert is_plain(tmp_path / "written.safetensors")


@pytest.mark.parametrize("source", FOREIGN, ids=lambda file: file.stem)
def test_what_was_remembered_of_names_changes_nothing(source: Path, tmp_path: Path) -> None:
    """Twice the width and rank under the same names, after the file itself was read."""
    table = read_table(source, read_raw_header(source, LoraFileError), LoraFileError)
    facts_of(table)
    wide = {name: torch.zeros([2 * extent for extent in form.shape]) for name, form in table.tensors.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    other = read_table(
        tmp_path / "wide.safetensors", read_raw_header(tmp_path / "wide.safetensors", LoraFileError), LoraFileError
    )
    # In the order of the first, whose names are remembered.
    other_forms = {name: other.tensors[name] for name in table.tensors}
    remembered = facts_of(safetensors_header.TensorTable(tensors=other_forms, metadata={}, payload_bytes=0))
    facts_of_names.cache_clear()
    assert remembered == facts_of(safetensors_header.TensorTable(tensors=other_forms, metadata={}, payload_bytes=0))


ENTRY = {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}
NEXT = {"dtype": "F32", "shape": [], "data_offsets": [12, 16]}


def write_text(file: Path, text: str | bytes, payload: int = 16) -> Path:
    content = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(struct.pack("<Q", len(content)) + content + bytes(payload))
    return file


def header_text(table: dict[str, Any], **options: Any) -> str:
    return json.dumps({"__metadata__": {"k": "v"}, **table}, **({"separators": (",", ":")} | options))


SOUND = {
    "plain": header_text({"a": ENTRY, "b": NEXT}),
    "padded": header_text({"a": ENTRY, "b": NEXT}) + "     ",
    "with spaces": header_text({"a": ENTRY, "b": NEXT}, separators=None),
    "in another order": header_text({"b": NEXT, "a": ENTRY}),
    "other order of an entry": header_text({"a": dict(reversed(ENTRY.items())), "b": NEXT}),
    "escaped name": header_text({'a"\\é': ENTRY, "b": NEXT}),
    "letters beyond ASCII": header_text({"é日": ENTRY, "b": NEXT}, ensure_ascii=False),
    "more in an entry": header_text({"a": {"dtype": "F16", "more": 1, **ENTRY}, "b": NEXT}),
}


@pytest.mark.parametrize("text", SOUND.values(), ids=SOUND)
def test_every_way_to_write_a_sound_header_is_read(tmp_path: Path, text: str) -> None:
    file = write_text(tmp_path / "a.safetensors", text)
    expected = {n: e for n, e in json.loads(text).items() if n != "__metadata__"}
    table = read_table(file, read_raw_header(file, LoraFileError), LoraFileError)
    assert table.tensors == {n: TensorForm(dtype=e["dtype"], shape=tuple(e["shape"])) for n, e in expected.items()}
    assert table.metadata == {"k": "v"}


PLAIN = SOUND["plain"]
FAULTS = {
    "no brace at the end": PLAIN[:-1],
    "two braces at the end": PLAIN + "}",
    "no comma": PLAIN.replace(',"b"', '"b"'),
    "two commas": PLAIN.replace(',"b"', ',,"b"'),
    "a space for the last brace": PLAIN[:-1].replace(',"b"', ', "b"'),
    "a name twice": PLAIN.replace('"b"', '"a"'),
    "unknown dtype": PLAIN.replace("F16", "F17"),
    "negative extent": PLAIN.replace("[2,3]", "[-2,-3]"),
    "extent that is no whole number": PLAIN.replace("[2,3]", "[2,3.0]"),
    "extent that begins with 0": PLAIN.replace("[2,3]", "[2,03]"),
    "true for an extent": PLAIN.replace("[2,3]", "[6,true]"),
    "place that begins with 0": PLAIN.replace("[12,16]", "[012,16]"),
    "a gap": PLAIN.replace("[12,16]", "[14,18]"),
    "an overlap": PLAIN.replace("[12,16]", "[10,14]"),
    "too many bytes for its shape": PLAIN.replace("[0,12]", "[0,14]").replace("[12,16]", "[14,18]"),
    "one place": PLAIN.replace("[12,16]", "[12]"),
    "no shape": PLAIN.replace('"shape":[2,3],', ""),
    "control character": PLAIN.replace('"b"', '"b\x01"'),
    "tail": PLAIN[:-1] + ',"c":1}',
}


@pytest.mark.parametrize("text", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_as_the_parser_tells_it(tmp_path: Path, text: str) -> None:
    assert text != PLAIN
    for payload in (16, 18):
        file = write_text(tmp_path / "a.safetensors", text, payload)
        raw = read_raw_header(file, LoraFileError)
        with pytest.raises(LoraFileError) as parsed:
            parse_header(file, raw, LoraFileError)
        with pytest.raises(LoraFileError) as read:
            read_table(file, raw, LoraFileError)
        assert str(read.value) == str(parsed.value)


def test_a_payload_of_another_size_is_told(tmp_path: Path) -> None:
    file = write_text(tmp_path / "a.safetensors", PLAIN, 15)
    assert is_plain(file)
    with pytest.raises(LoraFileError, match="1 bytes are missing at its end"):
        read_table(file, read_raw_header(file, LoraFileError), LoraFileError)


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1": None}, "sdxl"),
        ({"lora_unet_input_blocks_4_1_proj_in": (640, 640)}, "sdxl"),
        ({"lora_unet_input_blocks_1_1_proj_in": (320, 320, 1, 1)}, "sd1"),
        ({"unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": None}, "sdxl"),
        ({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768)}, "sd1"),
        ({"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v": (640, 1024)}, "sd2"),
        ({"lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320)}, "sd2"),
        ({"lora_unet_mid_block_attentions_0_proj_in": (1280, 1280)}, None),
        (
            {
                "lora_unet_mid_block_attentions_0_proj_in": (640, 640),
                "lora_unet_down_blocks_0_attentions_0_proj_out": None,
            },
            "sd2",
        ),
        ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q": (320, 768)}, None),
        ({}, None),
    ],
)
def test_the_family_that_names_and_shapes_show(modules: dict[str, tuple[int, ...] | None], family: str | None) -> None:
    found = family_of_shapes(modules)
    assert (found and found.name) == family
