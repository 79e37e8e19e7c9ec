"""Textual inversions: files against diffusers' own loading, words in prompts, those that LoRA files bring along."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sdlora
from sdlora.base.encode import encode_prompts
from sdlora.base.tokens import plain, tokenize
from sdlora.cli import app
from sdlora.errors import InversionFileError, SdloraError
from sdlora.formats.inversion_file import read_inversion
from sdlora.formats.recipe import parse_recipe
from sdlora.generation.inversions import read_inversions, with_inversions
from sdlora.generation.prompts import parse_prompt
from sdlora.generation.request import ImageRequest
from tests.test_generation import random_lora
from tests.tiny import opened, tiny_pipeline


def vectors(count: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) / 10


def written(file: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, file)
    return file


def ours(base: Path, prompt: str, negative: str = "", **options: Any) -> Any:
    settings: dict[str, Any] = {
        "negative": negative,
        "seed": 7,
        "steps": 2,
        "cfg": 4.0,
        "precision": "float32",
    } | options
    return sdlora.generate(prompt, base=base, **settings)[0]


def theirs(base: Path, prompt: str, negative: str, files: dict[str, Path]) -> torch.Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for token, file in files.items():
        pipe.load_textual_inversion(str(file.parent), weight_name=file.name, token=token)
    return pipe(
        prompt, negative_prompt=negative, num_inference_steps=2, guidance_scale=4.0, output_type="latent",
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip


def test_several_vectors_in_both_prompts_equal_diffusers(tiny_base: Path, tmp_path: Path) -> None:
    style = written(tmp_path / "MyStyle.safetensors", emb_params=vectors(3))
    bad = written(tmp_path / "bad-hands-5.safetensors", **{"<ugly>": vectors(1, seed=1)[0]})
    # In lower case, since diffusers finds only the first vector of a word with capitals.
    expected = theirs(tiny_base, "a fox in mystyle style", "blue, <ugly>", {"mystyle": style, "<ugly>": bad})
    given = {"embeddings": [style, bad]}
    made = ours(tiny_base, "a fox in MyStyle style", "blue, <ugly>", **given)
    assert (made.latents - expected).abs().max() < 1e-4
    # Named as people name it: by the file, in any case, as ComfyUI does.
    for word, negative in (("mystyle", "blue, bad-hands-5"), ("embedding:MyStyle", "blue, <UGLY>")):
        prompt = f"a fox in {word} style"
        assert torch.equal(ours(tiny_base, prompt, negative, **given).latents, made.latents)
    assert (ours(tiny_base, "a fox in MyStyle style", "blue, <ugly>").latents - made.latents).abs().max() > 1e-2


def test_both_encoders_of_sdxl_equal_diffusers(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    file = written(tmp_path / "neonzorb.safetensors", clip_l=vectors(2, 64), clip_g=vectors(2, 64, seed=1))
    pipe = tiny_pipeline("sdxl")
    for key, part in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            load_file(file)[key], token="neonzorb", text_encoder=getattr(pipe, f"text_encoder{part}"),
            tokenizer=getattr(pipe, f"tokenizer{part}"),
        )  # fmt: skip
    expected, _, pooled, _ = pipe.encode_prompt("a neonzorb fox", do_classifier_free_guidance=False)
    base = opened(tiny_files["sdxl"])
    request = ImageRequest(prompt="", inversions=read_inversions(file))
    base = with_inversions(base, [request], ())
    with torch.no_grad():
        made = encode_prompts(base, [tokenize(base, plain("a neonzorb fox"))])
    assert made.pooled is not None
    assert (made.context - expected).abs().max() < 1e-5
    assert (made.pooled - pooled).abs().max() < 1e-5


def test_weights_and_chunks_hold_for_the_vectors(tiny_base: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "ten.safetensors", emb_params=vectors(10))
    base = opened(tiny_base)
    base = with_inversions(base, [ImageRequest(prompt="", inversions=read_inversions(file))], ())
    first = base.text_encoders[0].model.config.vocab_size
    (tokens,) = tokenize(base, plain("a fox, " * 17 + "a ten fox"))
    # 17 times 3 tokens and "a" are 52; ten vectors fit. Of 70 and more they do not, and all go into the next chunk.
    assert tokens.chunks == 1
    assert tokens.ids[0, 53:63].tolist() == list(range(first, first + 10))
    (tokens,) = tokenize(base, plain("a fox, " * 23 + "a ten"))
    assert tokens.chunks == 2
    assert tokens.ids[1, 1:11].tolist() == list(range(first, first + 10))
    (tokens,) = tokenize(base, parse_prompt("fox (ten:1.4) fox"))
    assert tokens.weights[0, :14].tolist() == pytest.approx([1, 1, *[1.4] * 10, 1, 1])


@pytest.mark.parametrize(
    ("prompt", "uses"), [("a tent", False), ("attend", False), ("ten, fox", True), ("TEN", True), ("(ten)", True)]
)
def test_words_are_found_whole(tmp_path: Path, prompt: str, uses: bool) -> None:
    (inversion,) = read_inversions(written(tmp_path / "ten.safetensors", emb_params=vectors(1)))
    from sdlora.generation.inversions import used_inversions

    assert bool(used_inversions(ImageRequest(prompt=prompt, inversions=(inversion,)))) is uses


def test_the_longest_word_is_found_first(tiny_base: Path, tmp_path: Path) -> None:
    names = ["bad", "bad-hands"]
    files = [written(tmp_path / f"{name}.safetensors", emb_params=vectors(1)) for name in names]
    base = opened(tiny_base)
    base = with_inversions(base, [ImageRequest(prompt="", inversions=read_inversions(files))], ())
    words = base.text_encoders[0].word_vectors
    assert words is not None
    assert list(words.split("a bad-hands and a bad one")) == [
        "a ", (words.first_id + 1,), " and a ", (words.first_id,), " one",
    ]  # fmt: skip


def test_the_encoder_is_left_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "ten.safetensors", emb_params=vectors(2))
    with sdlora.open(tiny_base, precision="float32") as studio:
        before = studio.generate("ten", seed=1, steps=1)[0].latents
        between = studio.generate("ten", seed=1, steps=1, embeddings=file)[0].latents
        assert (between - before).abs().max() > 1e-4
        assert torch.equal(studio.generate("ten", seed=1, steps=1)[0].latents, before)


def test_the_recipe_names_what_was_used(tiny_base: Path, tmp_path: Path) -> None:
    import hashlib

    used = written(tmp_path / "ten.safetensors", emb_params=vectors(2))
    unused = written(tmp_path / "eleven.safetensors", emb_params=vectors(2))
    fields = parse_recipe(ours(tiny_base, "a fox", "ten", embeddings=[used, unused]).parameters).fields
    digest = hashlib.sha256(used.read_bytes()).hexdigest()
    assert fields["TI hashes"] == f"ten: {digest[:12]}"
    assert f'"embed:ten": "{digest[:10]}"' in fields["Hashes"]


def test_what_came_with_a_lora_is_used(tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = random_lora(tiny_base, tmp_path / "one.safetensors", seed=1)
    bare = load_file(file)
    own = written(tmp_path / "zorb.safetensors", emb_params=vectors(2))
    expected = ours(tiny_base, "a zorb", loras=str(file), embeddings=own).latents
    for key in ("clip_l", "string_to_param.*", "emb_params"):
        save_file(bare | {f"bundle_emb.zorb.{key}": vectors(2)}, file)
        assert torch.equal(ours(tiny_base, "a zorb", loras=str(file)).latents, expected)
    save_file(bare | {"bundle_emb.zorb.clip_l": vectors(2, 48)}, file)
    with caplog.at_level(logging.WARNING, "sdlora"):
        ours(tiny_base, "a zorb", loras=str(file))
    assert "vectors of 48 numbers" in caplog.text


def test_a_word_without_vectors_is_named(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sdlora"):
        ours(tiny_base, "embedding:zorb, a fox")
    assert "embedding:zorb: no textual inversion of this name is given" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emb_params": torch.ones(2, 2, 2)}, "emb_params: shape"),
        ({"emb_params": torch.full((1, 32), float("nan"))}, "NaN"),
        ({"emb_params": torch.ones(76, 32)}, "room for 75"),
        ({"emb_params": torch.ones(1, 32, dtype=torch.int64)}, "expected vectors"),
        ({"a": torch.ones(1, 32), "b": torch.ones(1, 32)}, "holds 2 tensors, such as a"),
        ({"lora_unet_x.lora_down.weight": torch.ones(1, 32)}, "holds a LoRA; name it with --lora"),
    ],
)
def test_other_forms_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InversionFileError, match=message) as caught:
        read_inversion(written(tmp_path / "x.safetensors", **tensors))
    assert str(tmp_path / "x.safetensors") in str(caught.value)


def test_all_files_that_cannot_be_used_are_named(tiny_base: Path, tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": vectors(1)}}, tmp_path / "old.pt")
    (tmp_path / "twice").mkdir()
    same = [written(folder / "same.safetensors", emb_params=vectors(1)) for folder in (tmp_path, tmp_path / "twice")]
    with pytest.raises(SdloraError) as caught:
        ours(tiny_base, "a fox", embeddings=[tmp_path / "old.pt", tmp_path / "none.safetensors", *same])
    lines = caught.value.problems
    assert len(lines) == 3
    for line, words in zip(lines, ("a pickle", "no such file", "has the word same too"), strict=True):
        assert words in line
    wide = written(tmp_path / "wide.safetensors", clip_l=vectors(1, 64), clip_g=vectors(1, 64))
    with pytest.raises(SdloraError, match=r"vectors of 64 and 64 numbers; those of the base tiny have 32"):
        ours(tiny_base, "a fox", embeddings=wide)


def test_the_command_takes_files(tiny_base: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "ten.safetensors", emb_params=vectors(2))
    given = ["--base", str(tiny_base), "--steps", "1", "--seed", "1", "--out", str(tmp_path / "made.png")]
    assert not app(["generate", "a ten", *given, "--embedding", str(file)], standalone_mode=False)
    from PIL import Image

    with Image.open(tmp_path / "made.png") as made:
        assert "TI hashes: " in made.info["parameters"]


def test_a_grid_takes_files_and_what_no_prompt_names_is_said(tiny_base: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "zorb.safetensors", emb_params=vectors(2))
    given = ["--base", str(tiny_base), "--embedding", str(file), "--steps", "1", "--out", str(tmp_path / "g.png")]
    result = CliRunner().invoke(app, ["grid", "a zorb fox", "--x", "prompt:zorb,red", *given])
    assert result.exit_code == 0, result.output
    (told,) = [line for line in result.stderr.splitlines() if "zorb" in line]
    assert told == f"{file}: the prompts do not have its word: zorb"
    one, other = json.loads((tmp_path / "g.cells" / "grid.json").read_text())["cells"]
    assert ("TI hashes" in one["parameters"], "TI hashes" in other["parameters"]) == (True, False)
    said: list[str] = []
    sdlora.generate("a fox", base=tiny_base, negative="Zorb", embeddings=file, steps=1, say=said.append)
    assert not any("zorb" in line for line in said)
