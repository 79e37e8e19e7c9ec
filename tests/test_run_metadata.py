"""What a run leaves in its file, by level, and that the same command knows its own output again."""

from __future__ import annotations

import base64
import hashlib
import json
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import sdlora
from sdlora.config.catalogue import default_settings
from sdlora.errors import ResumeError
from sdlora.formats.hashes import hash_file
from sdlora.formats.metadata_file import read_metadata, write_metadata


def trained(tiny_base: Path, images: Path, out: Path, *settings: str) -> sdlora.Config:
    given = [f"base.path={tiny_base}", f"data.images={images}", "data.trigger=zorb", f"output.path={out}"]
    config = sdlora.load_config(None, [*given, "train.steps=2", "data.resolution=64", *settings])
    sdlora.train(config)
    return config


def test_a_full_file_bears_a_thumbnail_and_hashes_that_hold(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    config = trained(tiny_base, images, out, 'samples.prompts=["a cat"]')
    metadata = read_metadata(out)
    kind, _, image = metadata["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(BytesIO(base64.b64decode(image))) as thumbnail:
        assert (thumbnail.format, thumbnail.size) == ("JPEG", (256, 256))
    data = out.read_bytes()
    payload = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert metadata["sshs_model_hash"] == payload
    assert metadata["modelspec.hash_sha256"] == f"0x{payload}"
    assert "ss_new_sd_model_hash" in metadata
    assert sdlora.inspect(out).problems == ()
    assert sdlora.train(config).result.loss is None
    assert out.read_bytes() == data


def test_a_setting_that_an_earlier_version_did_not_know_had_its_default(
    tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    config = trained(tiny_base, images, out, "samples.prompts=[]")
    metadata = read_metadata(out)
    run = json.loads(metadata["sdlora_run"])
    assert default_settings().items() & run["config"].items() >= {("data.flip", "false"), ("lora.rank", "16")}
    del run["config"]["data.flip"]
    write_metadata(out, out, metadata | {"sdlora_run": json.dumps(run)})
    assert sdlora.train(config).result.loss is None
    del run["config"]["data.resolution"]
    write_metadata(out, out, metadata | {"sdlora_run": json.dumps(run)})
    with pytest.raises(ResumeError, match=r"data\.resolution was not set, is now 64"):
        sdlora.train(config)


@pytest.mark.parametrize("level", ["minimal", "none"])
def test_a_file_that_says_less_is_known_by_its_record(
    level: str, tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.safetensors"
    config = trained(tiny_base, images, out, f"output.metadata={level}", 'samples.prompts=["a cat"]')
    metadata = read_metadata(out)
    assert ("sshs_model_hash" in metadata) is (level == "minimal")
    assert not any(word in json.dumps(metadata) for word in ("thumbnail", "images", "sdlora_run"))
    if level == "none":
        assert metadata == {}
    assert sdlora.train(config).result.loss is None
    record = out.with_suffix(".run.json")
    assert str(tmp_path) not in record.read_text()
    hashes = hash_file(out, 8 + int.from_bytes(out.read_bytes()[:8], "little"))
    assert json.loads(record.read_text())["sha256"] == hashes.sha256
    changed = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": 3})})
    with pytest.raises(ResumeError, match=r"lora\.rank was 16, is now 3"):
        sdlora.train(changed)
    record.unlink()
    with pytest.raises(ResumeError, match="not the output of a training run"):
        sdlora.train(config)
    sdlora.train(
        config.model_copy(update={"output": config.output.model_copy(update={"metadata": "full"})}), restart=True
    )
    assert not record.exists()


def test_the_hashes_of_a_base_file_are_stated(tiny_files: dict[str, Path], images: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "x.safetensors", tiny_files["sd1"]
    trained(base, images, out, "samples.prompts=[]")
    metadata = read_metadata(out)
    assert metadata["ss_sd_model_name"] == base.name
    assert metadata["ss_new_sd_model_hash"] == hashlib.sha256(base.read_bytes()).hexdigest()
    assert metadata["ss_sd_model_hash"] == hashlib.sha256(base.read_bytes()[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("level", ["full", "minimal"])
def test_new_texts_are_written_into_a_finished_file(level: str, tiny_base: Path, images: Path, tmp_path: Path) -> None:
    out, level_set = tmp_path / "x.safetensors", f"output.metadata={level}"
    config = trained(tiny_base, images, out, "samples.prompts=[]", level_set, "output.author=Ann", "output.license=MIT")
    before, data = read_metadata(out), out.read_bytes()
    texts = {"author": "Bea", "license": None, "tags": ("a", "b"), "comment": "a note"}
    changed = config.model_copy(update={"output": config.output.model_copy(update=texts)})
    result = sdlora.train(changed).result
    assert (result.texts_written, result.loss) == (True, None)
    expected = {"modelspec.author": "Bea", "modelspec.tags": "a, b"}
    expected |= {"ss_training_comment": "a note"} if level == "full" else {}
    after, legacy = read_metadata(out), "sshs_legacy_hash"
    assert {**after, legacy: ""} == {**before, **expected, legacy: ""}
    start, new = 8 + int.from_bytes(data[:8], "little"), out.read_bytes()
    assert new[8 + int.from_bytes(new[:8], "little") :] == data[start:]
    assert sdlora.inspect(out).problems == ()
    assert not sdlora.train(changed).result.texts_written
    assert out.read_bytes() == new
    other = changed.output.model_copy(update={"metadata": "none"})
    with pytest.raises(ResumeError, match=rf'output\.metadata was "{level}", is now "none"'):
        sdlora.train(changed.model_copy(update={"output": other}))
    assert out.read_bytes() == new
