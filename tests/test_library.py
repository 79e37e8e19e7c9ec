"""Lists of LoRAs: headers against the reader of whole files, searches, broken files, what fits a base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.base.checkpoint import find_base
from sdlora.errors import BaseModelError, CompatibilityError, LoraFileError
from sdlora.families import SDXL
from sdlora.formats.keys import part_of
from sdlora.formats.lora_file import read_lora
from sdlora.formats.lora_writer import write_lora
from sdlora.formats.published import published_modules
from sdlora.generation.loras import LoraChoice, fit_loras
from sdlora.library.entry import LoraEntry
from sdlora.library.text import as_text
from sdlora.lora.low_rank import LowRank
from tests.library_files import listed, write

FOREIGN = Path(__file__).parent / "foreign"


@pytest.fixture(autouse=True)
def own_index(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def as_read(file: Path) -> dict[str, Any]:
    """What the reader of whole files finds."""
    lora = read_lora(file)
    parts, ranks = Counter(part_of(key) or "unknown" for key in lora.modules), [c.rank for c in lora.modules.values()]
    known = [rank for rank in ranks if rank is not None]
    return {
        "family": lora.family.name if lora.family else None,
        "format": lora.format,
        "kinds": lora.kinds,
        "modules": dict(parts),
        "ranks": (min(known), max(known)) if known else None,
        "dtype": lora.dtype,
    }


def as_listed(entry: LoraEntry) -> dict[str, Any]:
    fields = ("family", "format", "kinds", "modules", "ranks", "dtype")
    return {field: getattr(entry, field) for field in fields}


def test_headers_of_every_format_and_kind_say_what_reading_the_file_does() -> None:
    library = listed(FOREIGN)
    assert (len(library.loras), library.broken, library.others) == (23, (), 1)
    assert {kind for entry in library.loras for kind in entry.kinds} >= {
        "lora",
        "loha",
        "lokr",
        "ia3",
        "oft",
        "dora",
        "glora",
    }
    for entry in library.loras:
        assert as_listed(entry) == as_read(FOREIGN / entry.file), entry.file


def test_a_file_of_a_published_model_is_known_by_its_shapes(tmp_path: Path) -> None:
    modules = published_modules("sdxl")
    changes = {
        name: LowRank(down=torch.zeros(2, shape[1]), up=torch.zeros(shape[0], 2), alpha=1.0)
        for name, shape in list(modules.items())
        if name.endswith((".attn2.to_k", ".attn1.to_q", ".fc1"))
    }
    file = tmp_path / "xl.safetensors"
    write_lora(file, changes, {}, dtype=torch.float16, family=SDXL, base_modules=modules)
    # Without what the writer states of the family, so that names and shapes have to show it.
    save_file(load_file(file), file)
    (entry,) = listed(tmp_path).loras
    assert as_listed(entry) == as_read(file)
    assert (entry.family, entry.rank, entry.dtype) == ("sdxl", "2", "float16")


def test_what_is_beside_and_below(tmp_path: Path) -> None:
    stated = {"ss_output_name": "Night-Sky", "modelspec.title": "Night sky", "modelspec.trigger_phrase": "nsky, stars"}
    write(tmp_path / "b.safetensors", **stated, ss_sd_model_name="v1-5.safetensors", sshs_model_hash="ab" * 32)
    write(tmp_path / "deep" / "er" / "a.safetensors")
    write(tmp_path / "flux.safetensors", width=7, ss_base_model_version="flux1")
    write(tmp_path / ".hidden" / "no.safetensors")
    write(tmp_path / "b.resume" / "no.safetensors")
    (tmp_path / "peft").mkdir()
    os.link(FOREIGN / "peft-model.safetensors", tmp_path / "peft" / "adapter_model.safetensors")
    save_file({"emb_params": torch.zeros(2, 768)}, tmp_path / "embedding.safetensors")
    for name in ("b.png", "b.preview.png", "b.jpg", "deep/er/a.webp", "flux.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deep" / "er" / "a.json").write_text(json.dumps({"activation text": "watercolour, wet , "}))
    (tmp_path / "flux.json").write_text("[")
    library = listed(tmp_path)
    entries = {entry.file: entry for entry in library.loras}
    assert list(entries) == [
        *("b.safetensors", "deep/er/a.safetensors", "flux.safetensors", "peft/adapter_model.safetensors")
    ]
    assert (library.others, library.broken) == (1, ())
    first, deep, flux, adapter = entries.values()
    assert (first.name, first.alias, first.title, first.made_for) == ("b", "Night-Sky", "Night sky", "v1-5.safetensors")
    assert (first.family, first.rank, first.trigger, first.preview) == ("sd1", "4", ("nsky", "stars"), "b.preview.png")
    assert (first.autov3, first.hashed, first.autov2) == ("ab" * 6, False, None)
    assert (deep.trigger, deep.preview, deep.alias, deep.autov3) == (
        ("watercolour", "wet"),
        "deep/er/a.webp",
        None,
        None,
    )
    assert (flux.family, flux.made_for, flux.trigger, flux.preview) == (None, "flux1", (), None)
    assert (adapter.name, adapter.format) == ("peft", "peft")
    assert "(flux1)" in as_text(library)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("night", ["b"]),
        ("SKY stars", ["b"]),
        ("stars nothing", []),
        ("moon", ["b"]),
        ("deep", ["deep/a"]),
        ("safetensors", ["b", "deep/a"]),
        ("%", []),
    ],
)
def test_searching(tmp_path: Path, words: str, expected: list[str]) -> None:
    tags = json.dumps({"10_x": {"full moon": 3}})
    write(
        tmp_path / "x" / "b.safetensors",
        **{"modelspec.title": "Night SKY", "modelspec.trigger_phrase": "stars", "ss_tag_frequency": tags},
    )
    write(tmp_path / "x" / "deep" / "a.safetensors")
    found = listed(tmp_path / "x", search=words).loras
    assert [entry.file.removesuffix(".safetensors") for entry in found] == expected


def broken_files(folder: Path) -> dict[str, str]:
    """Name -> how its problem begins."""
    whole = write(folder / "sound.safetensors").read_bytes()
    twin = write(folder / "twin.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(twin[:-5])
    (folder / "long.safetensors").write_bytes(whole + b"x")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.safetensors").write_bytes(b"<html>not found, sorry</html>" * 9)
    (folder / "nan.safetensors").write_bytes(whole[:8] + b"[" + whole[9:])
    return {
        "cut.safetensors": "truncated or damaged: 5 bytes are missing",
        "long.safetensors": "truncated or damaged: bytes are left over",
        "empty.safetensors": "not a safetensors file: only 0 bytes long",
        "text.safetensors": "not a safetensors file, or truncated",
        "nan.safetensors": "not a safetensors file: its header cannot be parsed",
    }


def test_broken_files_are_a_line_each_and_stop_nothing(tmp_path: Path) -> None:
    expected = broken_files(tmp_path)
    for _ in ("read", "remembered"):
        library = listed(tmp_path)
        assert [entry.file for entry in library.loras] == ["sound.safetensors", "twin.safetensors"]
        assert [file.file for file in listed(tmp_path, search="LONG").broken] == ["long.safetensors"]
        assert {file.file for file in library.broken} == set(expected)
        for file in library.broken:
            assert file.problem.startswith(expected[file.file])
            assert str(tmp_path) not in file.problem
    assert sum(line.startswith("broken: ") for line in as_text(library).splitlines()) == 5


def test_what_fits_a_base_is_what_can_be_put_on_it(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    """Each family's base against LoRAs for each family, one of them partly, and one of another size."""
    for family, file in tiny_files.items():
        base = find_base(str(file))
        changes = {
            name: LowRank(down=torch.ones(2, shape[1]), up=torch.ones(shape[0], 2), alpha=1.0)
            for name, shape in base.module_shapes().items()
            if name.endswith(("attn2.to_k", "attn1.to_q", "self_attn.q_proj"))
        }
        options: dict[str, Any] = {"family": base.family, "base_modules": base.module_shapes(), "dtype": torch.float32}
        write_lora(tmp_path / f"{family}.safetensors", changes, {}, **options)
        more = load_file(tmp_path / f"{family}.safetensors")
        prefix = "lora_te1_" if family == "sdxl" else "lora_te_"
        more |= {
            f"{prefix}text_model_encoder_layers_11_self_attn_q_proj.lora_{side}.weight": torch.ones(shape)
            for side, shape in (("down", (2, 64)), ("up", (64, 2)))
        }
        save_file(more, tmp_path / f"{family}-more.safetensors")
    write(tmp_path / "size.safetensors", width=70)
    for file in tiny_files.values():
        base = find_base(str(file))
        for entry in listed(tmp_path, base=str(file)).loras:
            try:
                fit_loras(base, [LoraChoice(file=tmp_path / entry.file)])
                expected = True
            except (CompatibilityError, LoraFileError):
                expected = False
            assert entry.fits == expected, (base.name, entry)
            assert (entry.reason is None) == (expected and "-more" not in entry.file)
    with pytest.raises(BaseModelError, match="no such base"):
        listed(tmp_path, base=str(tmp_path / "none.safetensors"))


def test_every_foreign_file_fits_where_its_shapes_do(tiny_base: Path) -> None:
    base = find_base(str(tiny_base))
    for entry in listed(FOREIGN, base=str(tiny_base)).loras:
        try:
            fit_loras(base, [LoraChoice(file=FOREIGN / entry.file)])
            expected = True
        except (CompatibilityError, LoraFileError):
            expected = False
        assert entry.fits == expected, entry


def test_the_command(sdlora: Any, tmp_path: Path) -> None:
    expected = broken_files(tmp_path / "loras")
    result = sdlora("list", "loras", "--json", "--duplicates")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["count"], len(report["broken"]), report["others"]) == (2, len(expected), 0)
    assert report["duplicates"] == [["sound.safetensors", "twin.safetensors"]]
    first = report["loras"][0]
    assert (first["name"], first["family"], first["rank"], first["dialect"]) == (
        "sound",
        "sd1",
        {"min": 4, "max": 4},
        "kohya",
    )
    result = sdlora("list", "loras")
    assert result.stdout.splitlines()[0].split() == ["name", "family", "rank", "size", "trigger", "hash", "preview"]
    assert result.stdout.splitlines()[1].split()[:3] == ["sound", "sd1", "4"]
    assert result.stdout.splitlines()[-1] == "loras: 2 LoRAs"
    result = sdlora("list", "none")
    assert (result.returncode, result.stderr) == (1, "error: none: no such folder of LoRAs\n")


def test_listing_imports_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    code = (
        "import sys, sdlora; print(len(sdlora.list_loras(sys.argv[1], progress=sdlora.Silence()).loras), "
        "sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout == "1 []\n"
