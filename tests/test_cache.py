"""The cache of encoded pictures and captions: never a wrong answer, whatever is edited, killed, torn or removed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from sdlora.base.checkpoint import find_base
from sdlora.base.encode import encode_pixels, encode_prompts
from sdlora.base.fingerprints import text_fingerprint, vae_fingerprint
from sdlora.base.load import Base, load_base
from sdlora.base.tokens import plain, tokenize
from sdlora.config import BaseSection, CacheSection
from sdlora.data.buckets import Placement
from sdlora.data.cache import CacheKey, EncodedCache, Job, fill, latent_key, open_cache, text_key
from sdlora.data.cache_files import cache_info, entries, file_of, prune
from sdlora.data.images import open_picture, place
from sdlora.progress import Silence
from tests.cache_processes import key_of, run_fill, tensors_of
from tests.conftest import ROOT, write_pictures

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path) -> EncodedCache:
    return EncodedCache(tmp_path / "cache", 1e9)


def only_file(folder: Path) -> Path:
    (entry,) = entries(folder)
    return entry.file


def same(one: Mapping[str, torch.Tensor] | None, other: Mapping[str, torch.Tensor]) -> bool:
    return (
        one is not None
        and one.keys() == other.keys()
        and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in other)
    )


# What comes back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_what_is_put_comes_back_as_it_was(cache: EncodedCache, dtype: torch.dtype) -> None:
    whole = (torch.randn(2, 4, 6, 5) * 3).to(dtype)
    halves = whole.transpose(2, 3)
    tensors = {"mean": halves[0], "std": halves[1], "one": whole[0, 0, 0, 0], "none": whole[:0]}
    assert cache.get(key_of(0)) is None
    cache.put(key_of(0), tensors)
    found = cache.get(key_of(0))
    assert same(found, tensors)
    assert found is not None
    found["mean"].zero_()
    assert same(cache.get(key_of(0)), tensors)


def test_an_entry_is_a_safetensors_file_that_tells_nothing_of_its_maker(cache: EncodedCache, tmp_path: Path) -> None:
    cache.put(key_of(3), tensors_of(3))
    digest = key_of(3).digest
    file = tmp_path / "cache" / "latents" / digest[:2] / f"{digest[2:]}.safetensors"
    assert same(load_file(file), tensors_of(3))
    header = file.read_bytes()[8:].partition(b"\0")[0].decode("ascii", "replace")
    assert not [word for word in (str(tmp_path), os.uname().nodename, "/") if word in header]
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_cache_that_keeps_nothing(tmp_path: Path) -> None:
    none = open_cache(CacheSection(disk=False, folder=str(tmp_path / "unused")))
    none.put(key_of(0), tensors_of(0))
    none.close()
    assert none.get(key_of(0)) is None
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_the_configured_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_cache(CacheSection()).put(key_of(0), tensors_of(0))
    open_cache(CacheSection(folder=str(tmp_path / "own"))).put(key_of(1), tensors_of(1))
    assert only_file(tmp_path / "xdg" / "sdlora" / "encoded").stem == key_of(0).digest[2:]
    assert only_file(tmp_path / "own").stem == key_of(1).digest[2:]


# Keys

sides = st.integers(1, 3)
placements = st.builds(
    Placement, width=sides, height=sides, scaled_width=sides, scaled_height=sides, left=sides, top=sides
)
fingerprints = st.sampled_from(["", "a", "ab", "b", '","'])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
devices = st.sampled_from([CPU, torch.device("cuda"), torch.device("cuda", 1)])
pictures_given = st.fixed_dictionaries(
    {
        "pixels": fingerprints,
        "placement": placements,
        "flipped": st.booleans(),
        "vae": fingerprints,
        "dtype": dtypes,
        "device": devices,
    }
)
chunks = st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=2), min_size=1, max_size=2)
captions_given = st.fixed_dictionaries(
    {
        "ids": st.lists(chunks, min_size=1, max_size=2),
        "weights": st.lists(chunks, min_size=1, max_size=2),
        "encoders": fingerprints,
        "dtype": dtypes,
        "device": devices,
    }
)


def caption_key(given: Mapping) -> CacheKey:
    ids = [torch.tensor(rows) for rows in given["ids"]]
    weights = [torch.tensor(rows) * 0.5 for rows in given["weights"]]
    return text_key(**{**given, "ids": ids, "weights": weights})


@given(pictures_given, pictures_given, st.data())
def test_distinct_pictures_have_distinct_keys(one: dict, other: dict, data: st.DataObject) -> None:
    other = {**one, **{name: other[name] for name in data.draw(st.sets(st.sampled_from(sorted(one))))}}
    # Cards of one kind compute alike.
    differs = {**one, "device": one["device"].type} != {**other, "device": other["device"].type}
    assert (latent_key(**one) != latent_key(**other)) == differs


@given(captions_given, captions_given, st.data())
def test_distinct_captions_have_distinct_keys(one: dict, other: dict, data: st.DataObject) -> None:
    other = {**one, **{name: other[name] for name in data.draw(st.sets(st.sampled_from(sorted(one))))}}
    differs = {**one, "device": one["device"].type} != {**other, "device": other["device"].type}
    assert (caption_key(one) != caption_key(other)) == differs


def test_keys_change_only_on_purpose() -> None:
    """A change here orphans every user's cache; it needs a new version of the encoding, and the other way round."""
    latents = (
        '["latents", 1, "p", {"height": 96, "left": 1, "scaled_height": 97, "scaled_width": 162, "top": 0, "width": 160}, '
        'true, "v", "torch.bfloat16", "cuda"]'
    )
    placement = Placement(width=160, height=96, scaled_width=162, scaled_height=97, left=1, top=0)
    cuda = torch.device("cuda", 1)
    told = latent_key(pixels="p", placement=placement, flipped=True, vae="v", dtype=torch.bfloat16, device=cuda)
    assert told == CacheKey(kind="latents", digest=hashlib.sha256(latents.encode()).hexdigest())
    text = '["text", 1, [[[[7, 8]]], [[[1.0, 1.5]]]], "e", "torch.float32", "cpu"]'
    ids, weights = [torch.tensor([[7, 8]])], [torch.tensor([[1.0, 1.5]])]
    told = text_key(ids=ids, weights=weights, encoders="e", dtype=torch.float32, device=CPU)
    assert told == CacheKey(kind="text", digest=hashlib.sha256(text.encode()).hexdigest())


# What is encoded anew


class Encoding:
    """Pictures of a folder through a real VAE and the cache, as a run does it; counts what is encoded."""

    def __init__(self, folder: Path, cache: EncodedCache, base: Base):
        self.folder, self.cache, self.base = folder, cache, base
        self.placement = Placement(width=64, height=64, scaled_width=72, scaled_height=64, left=4, top=0)
        self.flipped = False

    def run(self) -> list[str]:
        """Names of the pictures that were encoded; everything that comes out is compared with a fresh encoding."""
        encoded: list[str] = []
        jobs, fresh = [], []
        vae = vae_fingerprint(self.base)
        for file in sorted(self.folder.glob("*.png")):
            picture = open_picture(file)
            pixels = place(picture, self.placement).flip(-1) if self.flipped else place(picture, self.placement)
            key = latent_key(
                pixels=hashlib.sha256(picture.tobytes()).hexdigest(),
                placement=self.placement,
                flipped=self.flipped,
                vae=vae,
                dtype=self.base.vae.dtype,
                device=self.base.device,
            )
            jobs.append(Job(key=key, load=lambda name=file.name, pixels=pixels: (name, pixels)))
            fresh.append(self.encode(pixels))

        def encode(loaded: tuple[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            encoded.append(loaded[0])
            return self.encode(loaded[1])

        found = list(fill(self.cache, jobs, encode, progress=Silence(), task="Encoding"))
        assert all(same(one, other) for one, other in zip(found, fresh, strict=True))
        return sorted(encoded)

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        posterior = encode_pixels(self.base, pixels[None])
        return {"mean": posterior.mean[0], "std": posterior.std[0]}


ALL = ["0.png", "1.png", "2.png"]


@pytest.fixture
def encoding(tmp_path: Path, tiny_base: Path, cache: EncodedCache) -> Encoding:
    base = load_base(find_base(str(tiny_base)), device=CPU, dtype=torch.float32)
    made = Encoding(write_pictures(tmp_path / "pictures", 3, sizes=((72, 64),)), cache, base)
    assert made.run() == ALL
    assert made.run() == []
    return made


def test_an_edited_pixel_encodes_its_picture_alone(encoding: Encoding) -> None:
    pixels = np.asarray(Image.open(encoding.folder / "1.png")).copy()
    pixels[5, 7, 2] ^= 1
    Image.fromarray(pixels).save(encoding.folder / "1.png")
    assert encoding.run() == ["1.png"]
    assert encoding.run() == []


def test_a_renamed_or_copied_picture_is_not_encoded_again(encoding: Encoding) -> None:
    (encoding.folder / "0.png").rename(encoding.folder / "moved.png")
    (encoding.folder / "copy.png").write_bytes((encoding.folder / "2.png").read_bytes())
    assert encoding.run() == []


@pytest.mark.parametrize(
    "change",
    [
        {"width": 32, "height": 32, "scaled_width": 36, "scaled_height": 32},
        {"scaled_width": 80},
        {"left": 5},
        {"left": 0},
    ],
)
def test_another_size_or_crop_encodes_all(encoding: Encoding, change: dict[str, int]) -> None:
    before = encoding.placement
    encoding.placement = replace(before, **change)
    assert encoding.run() == ALL
    encoding.placement = before
    assert encoding.run() == []


def test_a_flip_encodes_all_and_the_unflipped_stay(encoding: Encoding) -> None:
    encoding.flipped = True
    assert encoding.run() == ALL
    encoding.flipped = False
    assert encoding.run() == []


def test_another_precision_encodes_all(encoding: Encoding) -> None:
    encoding.base.vae.to(torch.bfloat16)
    assert encoding.run() == ALL


def test_another_vae_encodes_all_and_another_decoder_nothing(encoding: Encoding, tiny_base: Path) -> None:
    with torch.no_grad():
        encoding.base.vae.decoder.conv_in.weight[0, 0, 0, 0] += 1
    assert encoding.run() == []
    with torch.no_grad():
        encoding.base.vae.encoder.mid_block.resnets[0].conv1.bias[-1] += 1e-3
    assert encoding.run() == ALL


def test_a_vae_named_by_the_user_encodes_all_and_its_exact_copy_nothing(
    encoding: Encoding, tiny_base: Path, tmp_path: Path
) -> None:
    source = tiny_base / "vae"
    weights = next(source.glob("*.safetensors"))
    for name, changed in (("copy", False), ("other", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(weights)
        if changed:
            tensors["encoder.conv_in.bias"][0] += 0.01
        save_file(tensors, tmp_path / name / weights.name)

    def load(vae: str) -> Base:
        checkpoint = find_base(BaseSection(path=str(tiny_base), vae=str(tmp_path / vae)))
        return load_base(checkpoint, device=CPU, dtype=torch.float32)

    encoding.base = load("copy")
    assert encoding.run() == []
    encoding.base = load("other")
    assert encoding.run() == ALL


def test_captions_are_encoded_anew_for_another_encoder_or_layer(tiny_base: Path, cache: EncodedCache) -> None:
    def encoded(base: Base, *captions: str) -> list[int]:
        made: list[int] = []
        jobs = []
        for number, caption in enumerate(captions):
            tokens = tokenize(base, plain(caption))
            key = text_key(
                ids=[own.ids for own in tokens],
                weights=[own.weights for own in tokens],
                encoders=text_fingerprint(base),
                dtype=base.dtype,
                device=base.device,
            )
            jobs.append(Job(key=key, load=lambda number=number, tokens=tokens: (number, tokens)))

        def encode(loaded) -> dict[str, torch.Tensor]:
            made.append(loaded[0])
            with torch.no_grad():
                return {"context": encode_prompts(base, [loaded[1]]).context[0]}

        fresh = [encode((0, tokenize(base, plain(caption))))["context"] for caption in captions]
        made.clear()
        found = fill(cache, jobs, encode, progress=Silence(), task="Encoding")
        assert all(torch.equal(one["context"], other) for one, other in zip(found, fresh, strict=True))
        return sorted(made)

    base = load_base(find_base(str(tiny_base)), device=CPU, dtype=torch.float32)
    assert encoded(base, "", "a red fox", "a blue fox") == [0, 1, 2]
    assert encoded(base, "a red fox", "a  RED fox", "", "two foxes") == [3]
    deeper = load_base(find_base(BaseSection(path=str(tiny_base), clip_skip=2)), device=CPU, dtype=torch.float32)
    assert encoded(deeper, "", "a red fox") == [0, 1]
    with torch.no_grad():
        next(base.text_encoders[0].model.parameters())[-1, -1] += 1
    assert encoded(base, "", "a red fox") == [0, 1]


# Filling


def test_fill_yields_in_order_loads_only_what_is_missing_and_counts(cache: EncodedCache) -> None:
    class Counts(Silence):
        started: tuple[str, int] | None = None
        done = 0

        def start(self, task: str, total: int, done: int = 0) -> None:
            self.started = task, total

        def advance(self, count: int = 1, note: str = "") -> None:
            self.done += count

    for number in (3, 11):
        cache.put(key_of(number), tensors_of(number))
    loaded: list[int] = []

    def load(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        loaded.append(number)
        return number

    progress = Counts()
    jobs = [Job(key=key_of(number), load=lambda number=number: load(number)) for number in range(30)]
    found = list(fill(cache, jobs, tensors_of, progress=progress, task="Encoding"))
    assert all(same(one, tensors_of(number)) for number, one in enumerate(found))
    assert sorted(loaded) == sorted(set(range(30)) - {3, 11})
    assert (progress.started, progress.done) == (("Encoding", 30), 30)
    assert list(fill(cache, [], tensors_of, progress=progress, task="Nothing")) == []


def test_fill_begins_no_more_than_it_may(cache: EncodedCache) -> None:
    """Memory stays flat however slow the encoder or whoever takes what it gives."""
    loaded: list[int] = []
    jobs = [Job(key=key_of(i), load=lambda i=i: loaded.append(i) or i) for i in range(40)]
    given_on = 0
    for _ in fill(cache, jobs, lambda i: tensors_of(i, 64), progress=Silence(), task="Encoding", ahead=4):
        given_on += 1
        time.sleep(0.002)
        assert len(loaded) <= given_on + 4
    assert given_on == 40


def test_threads_that_load_have_one_core_each_and_the_encoder_keeps_its_own(cache: EncodedCache) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        jobs = [Job(key=key_of(i), load=torch.get_num_threads) for i in range(20)]

        def encode(threads: int) -> dict[str, torch.Tensor]:
            return {"load": torch.tensor(threads), "encode": torch.tensor(torch.get_num_threads())}

        found = list(fill(cache, jobs, encode, progress=Silence(), task="Encoding"))
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
    assert {(int(one["load"]), int(one["encode"])) for one in found} == {(1, 3)}


@pytest.mark.parametrize("kept", [True, False])
def test_fill_without_a_place_to_keep_things(tmp_path: Path, kept: bool) -> None:
    encoded: list[int] = []
    for _ in range(2):
        run_fill(EncodedCache(tmp_path / "cache" if kept else None, 1e9), 12, encoded.append, seconds=0)
    assert sorted(encoded) == sorted([*range(12)] * (1 if kept else 2))


def test_what_another_process_puts_meanwhile_is_not_encoded_again(cache: EncodedCache, tmp_path: Path) -> None:
    other = EncodedCache(tmp_path / "cache", 1e9)
    encoded: list[int] = []

    def encode(number: int) -> dict[str, torch.Tensor]:
        encoded.append(number)
        for later in range(20):
            if later not in encoded:
                other.put(key_of(later), tensors_of(later))
        return tensors_of(number)

    jobs = [Job(key=key_of(number), load=lambda number=number: number) for number in range(20)]
    found = list(fill(cache, jobs, encode, progress=Silence(), task="Encoding"))
    assert len(encoded) == 1
    assert all(same(one, tensors_of(number)) for number, one in enumerate(found))


def test_a_fault_of_one_job_is_raised_and_what_was_encoded_before_is_kept(cache: EncodedCache, tmp_path: Path) -> None:
    def load(number: int) -> int:
        if number == 6:
            raise ValueError("no picture")
        return number

    jobs = [Job(key=key_of(i), load=lambda i=i: load(i)) for i in range(30)]
    got: list[dict[str, torch.Tensor]] = []
    with pytest.raises(ValueError, match="no picture"):
        got.extend(fill(cache, jobs, tensors_of, progress=Silence(), task="Encoding"))
    assert len(got) <= 6
    assert len(got) <= len(list(entries(tmp_path / "cache"))) <= 6 + 8
    assert all(cache.get(key_of(number)) is not None for number in range(len(got)))


# Real processes


def worker(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.cache_processes", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_fifty_kills_leave_a_cache_that_works(tmp_path: Path) -> None:
    folder, count, kills = tmp_path / "cache", 3000, 50
    with worker("kill", folder, count, kills) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    told = json.loads(out)
    assert [one["killed"] for one in told] == [True] * kills
    for one in told:
        assert one["begun"], "killed before it began"
        # All but the one that was being encoded or written are there, whole and right.
        assert one["kept"] in (one["begun"], one["begun"][:-1])
    kept = {number for one in told for number in one["kept"]}
    assert len(kept) > kills
    assert sum(len(one["begun"]) for one in told) <= len(kept) + kills
    cache = EncodedCache(folder, 1e9)
    assert all(same(cache.get(key_of(number)), tensors_of(number)) for number in kept)
    encoded: list[int] = []
    run_fill(cache, max(kept) + 1, encoded.append, seconds=0)
    assert sorted(encoded) == sorted(set(range(max(kept) + 1)) - kept)
    # Half-written files wait for the next look, an hour later at the earliest.
    left = list(folder.rglob("*.partial"))
    assert len(left) <= kills
    for file in left:
        os.utime(file, (1, 1))
    prune(folder, 1e9)
    assert list(folder.rglob("*.partial")) == []
    assert len(list(entries(folder))) == max(kept) + 1


@pytest.mark.parametrize("cap", [1e9, 1e6], ids=["roomy", "tight"])
def test_two_processes_fill_one_cache_together(tmp_path: Path, cap: float) -> None:
    """With a tight cap each removes, all the time, what the other may be about to read."""
    folder, count = tmp_path / "cache", 250
    processes = [worker("fill", folder, count, cap) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [(process.returncode, err) for process, (_, err) in zip(processes, answers, strict=True)] == [(0, "")] * 2
    encoded = [json.loads(out) for out, _ in answers]
    assert set(encoded[0]) | set(encoded[1]) == set(range(count))
    assert list(folder.rglob("*.partial")) == []
    total = cache_info(folder).bytes
    if cap == 1e6:
        assert 0 < total <= cap
        return
    assert min(map(len, encoded)) > 0
    assert sum(map(len, encoded)) < count * 1.5
    again: list[int] = []
    run_fill(EncodedCache(folder, cap), count, again.append)
    assert again == []


# Damage


def test_a_truncated_entry_is_a_miss_and_goes(cache: EncodedCache, tmp_path: Path) -> None:
    tensors = {"mean": torch.arange(8.0), "std": torch.ones(2)}
    cache.put(key_of(0), tensors)
    file = only_file(tmp_path / "cache")
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert cache.get(key_of(0)) is None, length
        assert not file.exists()
    file.write_bytes(whole)
    assert same(cache.get(key_of(0)), tensors)


def test_any_changed_byte_is_a_miss_or_changes_nothing(cache: EncodedCache, tmp_path: Path) -> None:
    """As after a power cut, when parts of a file may be zeros; and as a failing disk has it."""
    tensors = {"mean": torch.arange(8.0), "std": torch.ones(2)}
    cache.put(key_of(0), tensors)
    file = only_file(tmp_path / "cache")
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(len(whole)):
        for value in {0, 0x20, 0x7B, 0xFF, whole[position] ^ 1} - {whole[position]}:
            file.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            found = cache.get(key_of(0))
            assert found is None or (position < header and same(found, tensors)), (position, value)


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_are_a_miss(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-bytes"
    file = file_of(folder, "latents", key_of(0).digest)
    file.parent.mkdir(parents=True, exist_ok=True)
    for content in (data, len(data).to_bytes(8, "little") + data):
        file.write_bytes(content)
        assert EncodedCache(folder, 1e9).get(key_of(0)) is None
        assert not file.exists()


def test_an_entry_in_another_ones_place_is_a_miss(cache: EncodedCache, tmp_path: Path) -> None:
    cache.put(key_of(0), tensors_of(0))
    misplaced = file_of(tmp_path / "cache", "latents", key_of(1).digest)
    misplaced.parent.mkdir(parents=True, exist_ok=True)
    only_file(tmp_path / "cache").rename(misplaced)
    assert cache.get(key_of(1)) is None


def test_an_entry_that_is_removed_is_a_miss_and_can_be_put_again(cache: EncodedCache, tmp_path: Path) -> None:
    cache.put(key_of(0), tensors_of(0))
    only_file(tmp_path / "cache").unlink()
    assert cache.get(key_of(0)) is None
    cache.put(key_of(0), tensors_of(0))
    assert same(cache.get(key_of(0)), tensors_of(0))


# Disks that do not take it


def expect_one_warning(caplog: pytest.LogCaptureFixture, folder: Path, reason: str) -> None:
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    message = record.getMessage()
    assert str(folder) in message
    assert reason in message
    assert "cache.disk=false" in message


@contextmanager
def somebody_else() -> Generator[None]:
    """Within the block this process has no special rights; the superuser may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture(params=["a file in its place", "read-only", "full"])
def stubborn(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, str]]:
    """A folder that cannot be written to, and why."""
    folder = tmp_path / "cache"
    if request.param == "a file in its place":
        folder.write_text("mine")
        yield folder, "Not a directory"
    elif request.param == "read-only":
        run_fill(EncodedCache(tmp_path / "other", 1e9), 1, lambda number: None)  # Imports what is imported late.
        with tempfile.TemporaryDirectory() as place:
            Path(place).chmod(0o755)
            folder = Path(place) / "cache"
            EncodedCache(folder, 1e9).put(key_of(99), tensors_of(99))
            for directory in (folder, *(one for one in folder.rglob("*") if one.is_dir())):
                directory.chmod(0o555)
            with somebody_else():
                yield folder, "Permission denied"
            for directory in (folder, *(one for one in folder.rglob("*") if one.is_dir())):
                directory.chmod(0o755)
    else:
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        opened = Path.open
        monkeypatch.setattr(
            Path,
            "open",
            lambda path, *rest, **more: (
                opened(Path("/dev/full"), "wb", buffering=0)
                if path.suffix == ".partial"
                else opened(path, *rest, **more)
            ),
        )
        yield folder, "No space left on device"


def test_a_disk_that_takes_nothing_costs_time_and_one_warning(
    stubborn: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, reason = stubborn
    before, encoded = [entry.file for entry in entries(folder)], list[int]()
    with EncodedCache(folder, 1e9) as cache:
        for _ in range(2):
            run_fill(cache, 5, encoded.append, seconds=0)
        assert all(cache.get(key_of(99)) is not None for _ in before)
    assert sorted(encoded) == sorted([*range(5)] * 2)
    expect_one_warning(caplog, folder, reason)
    assert folder.is_file() or [file for file in folder.rglob("*") if file.is_file() and file not in before] == []


# The cap


def put_aged(cache: EncodedCache, folder: Path, count: int, floats: int = 256) -> int:
    """``count`` entries, the first the oldest; the size of one."""
    for number in range(count):
        cache.put(key_of(number), tensors_of(number, floats))
        file = file_of(folder, "latents", key_of(number).digest)
        os.utime(file, (1000 + number, 1000 + number))
    return file_of(folder, "latents", key_of(0).digest).stat().st_size


def present(cache: EncodedCache, count: int) -> list[int]:
    return [number for number in range(count) if cache.get(key_of(number)) is not None]


def test_the_least_recently_used_go_first(cache: EncodedCache, tmp_path: Path) -> None:
    size = put_aged(cache, tmp_path / "cache", 10)
    assert cache.get(key_of(2)) is not None
    gone = prune(tmp_path / "cache", size * 4 + size // 2)
    assert [entry.file.stem for entry in gone] == [key_of(number).digest[2:] for number in (0, 1, 3, 4, 5, 6)]
    assert present(cache, 10) == [2, 7, 8, 9]
    assert prune(tmp_path / "cache", size * 4) == ()


def test_a_run_leaves_the_folder_under_its_cap_and_never_far_above(tmp_path: Path) -> None:
    folder, encoded, most = tmp_path / "cache", [], 0
    cap = 50_000

    def look(number: int) -> None:
        nonlocal most
        most = max(most, cache_info(folder).bytes)
        encoded.append(number)

    jobs = [Job(key=key_of(number), load=lambda number=number: number) for number in range(100)]
    for _ in fill(
        EncodedCache(folder, cap), jobs, lambda n: look(n) or tensors_of(n, 512), progress=Silence(), task="Encoding"
    ):
        pass
    assert len(encoded) == 100
    assert cap < most < cap * 1.2
    assert cap * 0.9 < cache_info(folder).bytes <= cap


def test_a_process_that_adds_nothing_removes_nothing(cache: EncodedCache, tmp_path: Path) -> None:
    put_aged(cache, tmp_path / "cache", 5)
    with EncodedCache(tmp_path / "cache", 1) as other:
        assert present(other, 5) == [0, 1, 2, 3, 4]
    assert present(cache, 5) == [0, 1, 2, 3, 4]


def test_pruning_touches_nothing_but_entries(cache: EncodedCache, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    put_aged(cache, folder, 2)
    fan = next((folder / "latents").iterdir())
    others = [
        folder / "notes.txt",
        folder / "latents" / "x.safetensors",
        fan / "short.safetensors",
        fan / ".new.partial",
    ]
    for file in others:
        file.write_text("mine")
    assert len(prune(folder, 0)) == 2
    assert all(file.exists() for file in others)
    assert prune(tmp_path / "nowhere", 0) == ()


# The verbs


def test_cache_verbs(
    sdlora: Callable[..., subprocess.CompletedProcess[str]], cache: EncodedCache, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    size = put_aged(cache, folder, 4)
    key = text_key(ids=[torch.ones(1, 77)], weights=[torch.ones(1, 77)], encoders="e", dtype=torch.float32, device=CPU)
    cache.put(key, {"context": torch.ones(77, 8)})
    small = os.path.getsize(file_of(folder, "text", key.digest))
    told = json.loads(sdlora("cache", "info", "--folder", folder, "--json").stdout)
    assert told.pop("newest").startswith("20")
    assert told == {
        "folder": str(folder),
        "entries": 5,
        "bytes": 4 * size + small,
        "oldest": "1970-01-01T00:16:40+00:00",
        "kinds": {"latents": {"entries": 4, "bytes": 4 * size}, "text": {"entries": 1, "bytes": small}},
    }
    assert "5 entries" in sdlora("cache", "info", "--folder", folder).stdout
    pruned = json.loads(
        sdlora("cache", "prune", "--folder", folder, "--max-gigabytes", (2 * size + small) / 1e9, "--json").stdout
    )
    assert (pruned["removed"], pruned["removed_bytes"], pruned["left"]["entries"]) == (2, 2 * size, 3)
    assert present(cache, 4) == [2, 3]
    assert "0 entries removed" in sdlora("cache", "prune", "--folder", folder).stdout
    assert "3 entries removed" in sdlora("cache", "prune", "--folder", folder, "--all").stdout
    assert list(entries(folder)) == []


def test_cache_verbs_look_at_the_users_folder(
    sdlora: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    told = json.loads(sdlora("cache", "info", "--json").stdout)
    assert (told["folder"], told["entries"], told["oldest"]) == (str(tmp_path / "xdg/sdlora/encoded"), 0, None)
    assert not (tmp_path / "xdg").exists()
    open_cache(CacheSection()).put(key_of(0), tensors_of(0))
    assert json.loads(sdlora("cache", "prune", "--all", "--json").stdout)["removed"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("info", "--folder", "nowhere"), 1, "nowhere: no such folder"),
        (("prune", "--folder", "nowhere", "--all"), 1, "nowhere: no such folder"),
        (("prune", "--all", "--max-gigabytes", "1"), 2, "--max-gigabytes or --all"),
        (("prune", "--max-gigabytes", "nan"), 2, "--max-gigabytes"),
        (("prune", "--max-gigabytes", "-1"), 2, "--max-gigabytes"),
    ],
)
def test_wrong_uses_of_the_cache_verbs(
    sdlora: Callable[..., subprocess.CompletedProcess[str]], arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = sdlora("cache", *arguments)
    assert result.returncode == code
    assert message in " ".join(re.sub("[│\n]", " ", result.stderr).split())
    assert "Traceback" not in result.stderr
