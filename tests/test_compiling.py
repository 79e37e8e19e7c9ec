"""``train.compile``: the steps of compiled blocks, and what happens where they cannot be compiled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import sdlora
from sdlora.progress import Silence
from tests.training_runs import STEPS, config_for, same_but_for_times

# torch's own look at tensors while it traces; python shows it only where all warnings are shown.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def forgotten() -> Generator[None]:
    """Nothing is left of what other tests have compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("more", [
    (), ("lora.kind=dora",), ("lora.kind=lokr",), ("lora.init=orthogonal", "lora.dropout=0.1"),
    ("train.precision=bfloat16", "train.micro_batch=1"),
])  # fmt: skip
def test_compiled_steps_equal_others_up_to_rounding(
    more: tuple[str, ...], tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler's front and autograd's part; to generate C++ takes half a minute and is torch's own.
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **options: compiled(module, backend="aot_eager", **options)
    )
    runs: dict[str, list[float]] = {}
    for form in ("false", "true"):
        config = config_for(tiny_base, images, tmp_path / f"{form}.safetensors", f"train.compile={form}", *more)
        runs[form] = []
        sdlora.train(config, progress=Silence(), on_step=lambda record, kept=runs[form]: kept.append(record.loss))
        assert bool(counters["stats"].get("unique_graphs")) == (form == "true")
    bound = 0.02 if "train.precision=bfloat16" in more else 1e-4
    assert len(runs["true"]) == STEPS
    torch.testing.assert_close(torch.tensor(runs["true"]), torch.tensor(runs["false"]), rtol=bound, atol=0)
    # LoKr takes a gradient within its layer, and dropout has a lock: those are computed between two compiled parts.
    assert bool(counters["graph_break"]) == bool({"lora.kind=lokr", "lora.dropout=0.1"} & set(more))


def test_where_there_is_no_compiler_the_run_goes_on_without(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, without = (tmp_path / name / "x.safetensors" for name in ("plain", "without"))
    sdlora.train(config_for(tiny_base, images, plain), progress=Silence())
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    with caplog.at_level(logging.WARNING, logger="sdlora"):
        sdlora.train(config_for(tiny_base, images, without, "train.compile=true"), progress=Silence())
    (said,) = [record.getMessage() for record in caplog.records if "compiling" in record.getMessage()]
    assert said.startswith("step 1: compiling failed, from now on without: ")
    assert "no-such-compiler" in said
    assert "\n" not in said
    same_but_for_times(without, plain)


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_same_bits(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    """With the code that torch generates for this machine."""
    whole, halves = (tmp_path / name / "x.safetensors" for name in ("whole", "halves"))
    sdlora.train(config_for(tiny_base, images, whole, "train.compile=true"), progress=Silence())
    stop = threading.Event()
    config = config_for(tiny_base, images, halves, "train.compile=true")
    with pytest.raises(sdlora.Interrupted):
        sdlora.train(config, progress=Silence(), stop=stop, on_step=lambda _: stop.set())
    assert 0 < sdlora.train(config, progress=Silence()).result.resumed_from < STEPS
    same_but_for_times(whole, halves)
