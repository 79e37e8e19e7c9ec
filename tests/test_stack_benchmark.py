"""The benchmark of stacking: both sides put the same changes on the same model, and take them off again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import stack

pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def test_both_sides_make_the_same_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe, family = stack.open_pipeline("tiny", torch.float32)
    files = stack.write_files(tmp_path, pipe.unet, family, rank=4, count=stack.STACKED)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 128)
    added = {"text_embeds": torch.zeros(1, 48), "time_ids": torch.zeros(1, 6)}

    def output() -> torch.Tensor:
        return pipe.unet(latents, 500, text, added_cond_kwargs=added).sample

    bare, seen = output(), {}
    for name, side in stack.sides_of(stack.Setting(pipe=pipe, files=files)).items():
        side.make_ready()
        ready = output()
        side.change(stack.OTHER_WEIGHT)
        seen[name] = (ready, output())
        side.remove()
        torch.testing.assert_close(output(), bare, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(seen["sdlora"], seen["diffusers"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert (ours - bare).abs().max() > 1e-2
    assert (seen["sdlora"][0] - seen["sdlora"][1]).abs().max() > 1e-3


def test_the_table_has_a_line_for_each_thing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "IN_STEP", stack.STACKED)
    rows = stack.compare("tiny", tmp_path, dtype=torch.float32, rank=4, rounds=1, pixels=64)
    assert [row["what"] for row in rows] == ["ready", "one weight", "step with 3"]
    assert all(row["sdlora, s"] > 0 and row["diffusers, s"] > 0 for row in rows)
    assert rows[-1]["sdlora / bare"][0] > 0
