"""Lists of LoRAs: headers against the reader of whole files, the index and its faults, equal tensors, what fits a base."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sdlora
from sdlora.base.checkpoint import find_base
from sdlora.errors import BaseModelError, CompatibilityError, Interrupted, LoraFileError
from sdlora.families import SDXL
from sdlora.formats.hashes import hash_file
from sdlora.formats.keys import part_of
from sdlora.formats.lora_file import read_lora
from sdlora.formats.lora_writer import write_lora
from sdlora.formats.published import published_modules
from sdlora.formats.safetensors_header import RawHeader, read_raw_header, split_header
from sdlora.generation.loras import LoraChoice, fit_loras
from sdlora.library import equal, header, index
from sdlora.library.entry import LoraEntry, LoraLibrary
from sdlora.library.text import as_text
from sdlora.lora.low_rank import LowRank
from sdlora.progress import Silence

FOREIGN = Path(__file__).parent / "foreign"
KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(autouse=True)
def own_index(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def listed(folder: Path, **options: Any) -> LoraLibrary:
    return sdlora.list_loras(folder, progress=Silence(), **options)


def write(file: Path, *, seed: int = 0, rank: int = 4, width: int = 768, **metadata: str) -> Path:
    """One module of kohya's; of SD 1.x with text width 768."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"{KEY}.lora_down.weight": torch.randn(rank, width, generator=generator),
        f"{KEY}.lora_up.weight": torch.randn(320, rank, generator=generator),
        f"{KEY}.alpha": torch.tensor(1.0),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata=metadata or None)
    return file


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


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose headers are read, as they are."""
    names: list[str] = []
    read = header.read_raw_header

    def noted(path: Path, error: type[LoraFileError]) -> RawHeader:
        names.append(path.name)
        return read(path, error)

    monkeypatch.setattr(header, "read_raw_header", noted)
    return names


def test_only_what_changed_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    for name in "abc":
        write(tmp_path / "x" / f"{name}.safetensors")
    write(tmp_path / "xy.safetensors")
    first = listed(tmp_path)
    assert sorted(reads) == ["a.safetensors", "b.safetensors", "c.safetensors", "xy.safetensors"]
    assert listed(tmp_path) == first
    assert [entry.name for entry in listed(tmp_path / "x").loras] == ["a", "b", "c"]
    assert len(reads) == 4
    write(tmp_path / "x" / "a.safetensors", rank=8, ss_output_name="other")
    (tmp_path / "x" / "b.safetensors").unlink()
    (tmp_path / "x" / "c.json").write_text('{"activation text": "new"}')
    again = listed(tmp_path)
    assert reads[4:] == ["a.safetensors", "c.safetensors"]
    assert [(e.name, e.rank, e.alias, e.trigger) for e in again.loras] == [
        ("a", "8", "other", ()),
        ("c", "4", None, ("new",)),
        ("xy", "4", None, ()),
    ]
    with sqlite3.connect(index.index_file()) as kept:
        assert kept.execute("SELECT count(*) FROM files").fetchone() == (3,)


def test_tables_of_one_layout_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write(tmp_path / f"{number}.safetensors", seed=number, ss_output_name=f"n{number}", x="é" * number)
    write(tmp_path / "8.safetensors", rank=8, ss_output_name="n")
    parsed, parse = [], header.parse_header
    monkeypatch.setattr(header, "parse_header", lambda *given: (parsed.append(given[0].name), parse(*given))[1])
    loras = listed(tmp_path).loras
    assert [entry.alias for entry in loras] == ["n0", "n1", "n2", "n3", "n4", "n"]
    assert len({entry.layout for entry in loras}) == len(parsed) == 2


@pytest.mark.parametrize("letters", [10, 65_500, 65_536, 70_000, 200_000])
def test_metadata_of_any_length_are_split_off(tmp_path: Path, letters: int) -> None:
    """Read in a piece, which their end may lie beyond or cut through."""
    for name, letter in (("one", "x"), ("two", "é"), ("three", '"'), ("four", "}")):
        write(tmp_path / f"{name}.safetensors", ss_output_name=name, a=letter * letters, z="ü" * letters)
    library = listed(tmp_path)
    assert {entry.name: len({entry.layout for entry in library.loras}) for entry in library.loras} == dict.fromkeys(
        ("one", "two", "three", "four"), 1
    )
    for entry in library.loras:
        split = split_header(read_raw_header(tmp_path / entry.file, LoraFileError))
        assert split is not None
        with safe_open(tmp_path / entry.file, "pt") as file:
            assert split[0] == file.metadata()
        assert set(json.loads("{" + bytes(split[1]).decode().removeprefix(","))) == set(
            load_file(tmp_path / entry.file)
        )


def garbage(file: Path) -> None:
    file.write_bytes(b"not a database " * 999)


def torn(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:4096] + os.urandom(len(content) - 4096))


def of_another_version(file: Path) -> None:
    with sqlite3.connect(file) as kept:
        kept.executescript("DROP TABLE files; CREATE TABLE files (x); PRAGMA user_version = 99")


def of_another_program(file: Path) -> None:
    with sqlite3.connect(file) as kept:
        kept.executescript("DROP TABLE files; CREATE TABLE files (x)")


def with_other_content(file: Path) -> None:
    with sqlite3.connect(file) as kept:
        kept.execute("UPDATE files SET facts = '{\"a\": 1}'")


def with_broken_content(file: Path) -> None:
    with sqlite3.connect(file) as kept:
        kept.execute("UPDATE layouts SET facts = 'x'")


@pytest.mark.parametrize(
    "damage", [garbage, torn, of_another_version, of_another_program, with_other_content, with_broken_content]
)
def test_a_damaged_index_is_made_anew(tmp_path: Path, reads: list[str], damage: Any) -> None:
    for number in range(30):
        write(tmp_path / f"{number:02}.safetensors", rank=1, ss_output_name="o" * 300)
    first = listed(tmp_path)
    damage(index.index_file())
    assert listed(tmp_path) == first
    assert len(reads) == 60
    assert listed(tmp_path) == first
    assert len(reads) == 60


def test_without_a_place_for_the_index_everything_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "loras" / "a.safetensors")
    write(tmp_path / "loras" / "b.safetensors")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    library = listed(tmp_path / "loras", duplicates=True)
    assert library.duplicates == (("a.safetensors", "b.safetensors"),)


def test_an_index_that_another_process_writes_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    write(tmp_path / "a.safetensors")
    first = listed(tmp_path)
    monkeypatch.setattr(index, "WAIT", 0.01)
    other = sqlite3.connect(index.index_file(), isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert listed(tmp_path) == first
    other.execute("ROLLBACK")
    other.close()
    assert listed(tmp_path) == first
    assert len(reads) == 2


def test_what_was_read_before_an_interruption_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[str]
) -> None:
    from sdlora.library import listing

    monkeypatch.setattr(listing, "_AT_ONCE", 2)
    for name in "abcde":
        write(tmp_path / f"{name}.safetensors")
    stop = threading.Event()

    class StopsAfterTwo(Silence):
        def advance(self, count: int = 1, note: str = "") -> None:
            stop.set()

    with pytest.raises(Interrupted, match="what was read is kept"):
        sdlora.list_loras(tmp_path, progress=StopsAfterTwo(), stop=stop)
    assert len(reads) == 2
    assert len(listed(tmp_path).loras) == len(reads) == 5


def test_equal_tensors_are_found_whatever_the_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.safetensors", seed=1, rank=64, ss_output_name="one")
    write(tmp_path / "copy" / "b.safetensors", seed=1, rank=64, ss_output_name="another, and longer")
    write(tmp_path / "c.safetensors", seed=2, rank=64)
    write(tmp_path / "other-rank.safetensors", seed=1, rank=8)
    tensors = load_file(tmp_path / "a.safetensors")
    tensors[f"{KEY}.lora_down.weight"].view(-1)[5000] += 1  # Between two of the sampled places.
    save_file(tensors, tmp_path / "d.safetensors")
    hashed, hash_one = [], equal.file_hashes
    monkeypatch.setattr(equal, "file_hashes", lambda path: (hashed.append(path.name), hash_one(path))[1])
    library = listed(tmp_path, duplicates=True)
    assert library.duplicates == (("a.safetensors", "copy/b.safetensors"),)
    assert sorted(hashed) == ["a.safetensors", "b.safetensors", "d.safetensors"]
    assert listed(tmp_path, duplicates=True) == library
    assert len(hashed) == 3
    found = {entry.file: entry for entry in library.loras}
    assert found["a.safetensors"].autov3 == found["copy/b.safetensors"].autov3
    assert found["a.safetensors"].autov2 != found["copy/b.safetensors"].autov2
    assert not found["c.safetensors"].hashed
    assert listed(tmp_path, duplicates=True, search="other-rank").duplicates == ()
    assert "equal tensors: a.safetensors, copy/b.safetensors" in as_text(library)


def test_hashes_are_those_of_the_bytes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", sshs_model_hash="ab" * 32, ss_output_name="other")
    (entry,) = listed(tmp_path, hashes=True).loras
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert entry.autov2 == hashlib.sha256(content).hexdigest()[:10]
    assert entry.autov3 == hashlib.sha256(content[start:]).hexdigest()[:12] == hash_file(file, start).autov3
    assert entry.hashed
    assert listed(tmp_path, search="other").loras == (entry,)


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
