"""Images under way: the estimate by its formulas, the files, what terminals are sent, and that nothing else changes."""

from __future__ import annotations

import base64
import io
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import sdlora
from sdlora.cli import app
from sdlora.cli.preview import TerminalPreview, image_protocol, image_sequence, sixels
from sdlora.generation import preview
from sdlora.generation.preview import FilePreview, ShowsImages, clean_estimate, preview_image, watch_of
from sdlora.progress import Silence
from tests.tiny import opened

GIVEN: dict[str, Any] = {"seed": 1, "steps": 5, "size": 64, "sampler": "ddim"}


class Album(Silence):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.images: list[Image.Image] = []

    def show(self, image: Image.Image) -> None:
        self.images.append(image)


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "SECONDS_APART", 0.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_estimate_is_what_the_noise_was_added_to(prediction: str) -> None:
    clean, noise, signal = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 4, 8, 8).double(), 0.3
    noisy = signal**0.5 * clean + (1 - signal) ** 0.5 * noise
    velocity = signal**0.5 * noise - (1 - signal) ** 0.5 * clean
    predicted = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[prediction]
    torch.testing.assert_close(clean_estimate(noisy, predicted, signal, prediction), clean)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++2m"])
def test_previews_come_close_to_the_image_and_change_nothing(sampler: str, tiny_base: Path, every_step: None) -> None:
    given = GIVEN | {"base": tiny_base, "count": 2, "sampler": sampler}
    album = Album()
    seen = sdlora.generate("a fox", progress=album, **given)
    plain = sdlora.generate("a fox", progress=Silence(), **given)
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(seen, plain, strict=True))
    assert [image.size for image in album.images] == [(128, 64)] * 5
    final = np.concatenate([np.asarray(image.image, float) for image in seen], 1)
    distances = [np.abs(np.asarray(image, float) - final).mean() for image in album.images]
    assert distances[-1] < distances[0]
    assert distances[-1] < 4


def test_without_anybody_who_looks_nothing_is_made(tiny_base: Path) -> None:
    base = opened(tiny_base)
    assert watch_of(base, Silence()) is None
    assert watch_of(base, sdlora.CallbackProgress(print)) is None
    assert isinstance(FilePreview(Silence(), Path("x.png")), ShowsImages)


def test_one_image_a_second_at_most(tiny_base: Path) -> None:
    base, album, now = opened(tiny_base), Album(), [0.0]
    watch = watch_of(base, album, clock=lambda: now[0])
    assert watch is not None
    for seconds in (0.0, 0.4, 0.9, 1.1, 1.5, 2.2):
        now[0] = seconds
        watch(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor(500.6))
    assert len(album.images) == 3


def test_a_large_vae_is_approximated(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = opened(tiny_base)
    decoded = preview_image(base, torch.zeros(1, 4, 8, 8))
    expected = base.vae.decode(torch.zeros(1, 4, 8, 8)).sample.div(2).add(0.5).clamp(0, 1).mul(255).round()
    assert np.array_equal(np.asarray(decoded), expected[0].permute(1, 2, 0).byte().numpy())
    monkeypatch.setattr(preview, "_DECODED_PARAMETERS", 0)
    latents = torch.tensor([1.0, 0.5, -1.0, 0.2])[:, None, None].expand(4, 8, 16)
    image = preview_image(base, torch.stack([latents, 0 * latents]))
    red = 0.3512 + 0.5 * 0.3250 + 0.2829 - 0.2 * 0.2120
    blue = 0.3227 + 0.5 * 0.2350 - 0.2721 - 0.2 * 0.7177
    pixel = image.getpixel((0, 0))
    assert image.size == (2 * 128, 64)
    assert isinstance(pixel, tuple)
    assert pixel[0] == round(255 * (red / 2 + 0.5))
    assert pixel[2] == round(255 * (blue / 2 + 0.5))
    assert image.getpixel((200, 10)) == (128, 128, 128)


def test_a_preview_that_fails_is_the_last(tiny_base: Path, every_step: None, caplog: pytest.LogCaptureFixture) -> None:
    class Full(Album):
        def show(self, image: Image.Image) -> None:
            super().show(image)
            raise OSError("the disk is full")

    full = Full()
    with caplog.at_level(logging.WARNING, "sdlora"):
        assert len(sdlora.generate("a fox", base=tiny_base, progress=full, **GIVEN)) == 1
    assert [record.getMessage() for record in caplog.records] == ["no further previews: the disk is full"]
    assert len(full.images) == 1


def test_the_command_rewrites_a_file(tiny_base: Path, tmp_path: Path) -> None:
    given = ["generate", "a fox", "--base", str(tiny_base), "--steps", "3", "--out", str(tmp_path / "out.png")]
    result = CliRunner().invoke(app, [*given, "--preview", str(tmp_path / "now.png")])
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "now.png") as image:
        assert image.size == (64, 64)
    for where, message in (
        ("terminal", "--preview terminal: this terminal is not known to show images"),
        (str(tmp_path / "x.jpg"), "expected terminal, or a file that ends in .png"),
        (str(tmp_path / "now.png" / "x.png"), "now.png"),
    ):
        wrong = CliRunner().invoke(app, [*given, "--preview", where])
        assert (wrong.exit_code, message in wrong.stderr, len(wrong.stderr.splitlines())) == (1, True, 1)


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, None),
        ({}, None),
    ],
)
def test_terminals_are_known_by_their_variables(environment: dict[str, str], protocol: str | None) -> None:
    assert image_protocol(environment) == protocol


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("protocol", ["kitty", "iterm2"])
def test_a_terminal_is_sent_a_png(protocol: str) -> None:
    sent = image_sequence(noise(128, 64), protocol)
    if protocol == "kitty":
        parts = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", sent)
        assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in parts) == sent
        assert parts[0][0] == "a=T,f=100,i=1,q=2,C=1,r=16,m=1"
        assert [keys for keys, _ in parts[1:]] == ["m=1"] * (len(parts) - 2) + ["m=0"]
        assert all(len(data) <= 4096 for _, data in parts)
        data = "".join(data for _, data in parts)
    else:
        match = re.fullmatch(
            r"\x1b\]1337;File=inline=1;size=(\d+);height=16;preserveAspectRatio=1:([^\x07]*)\x07", sent
        )
        assert match is not None
        data = match[2]
        assert len(base64.b64decode(data)) == int(match[1])
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.format, image.size) == ("PNG", (576, 288))


def test_sixels_read_back_are_the_image() -> None:
    image = noise(16, 16).resize((20, 15), Image.Resampling.NEAREST)
    sent = sixels(image)
    expected = np.asarray(image.quantize(64).convert("RGB"), int)
    head = '\x1bPq"1;1;20;15'
    assert sent.startswith(head)
    assert sent.endswith("\x1b\\")
    drawn = np.full((15, 20, 3), -1)
    palette: dict[int, tuple[int, ...]] = {}
    column = top = colour = 0
    for token in re.findall(r"#\d+(?:;2;\d+;\d+;\d+)?|[$-]|[?-~]", sent[len(head) : -2]):
        if token[0] == "#":
            colour, *values = (int(part) for part in token[1:].split(";"))
            if values:
                palette[colour] = tuple(values[1:])
        elif token in "$-":
            column, top = 0, top + 6 * (token == "-")
        else:
            for row in range(6):
                if (ord(token) - 63) >> row & 1:
                    drawn[top + row, column] = palette[colour]
            column += 1
    assert np.abs(drawn * 2.55 - expected).max() <= 2


def test_the_terminal_is_drawn_over_in_place() -> None:
    stream = io.StringIO()
    with TerminalPreview(stream, "iterm2") as shown:
        shown.start("Generating", 4)
        shown.advance()
        shown.show(noise(8, 8))
        shown.advance()
        shown.show(noise(8, 8))
    text = stream.getvalue()
    # Room is made once; each image starts sixteen lines above the line of the progress, and the cursor comes back to it.
    assert text.count("\n" * 16) == 1
    assert len(re.findall(r"\r\x1b\[16A\x1b7\x1b\]1337;[^\x07]*\x07\x1b8\x1b\[16B\r\x1b\[2KGenerating", text)) == 2
    assert "2/4" in text.splitlines()[-1]
    assert text.endswith("\n")
