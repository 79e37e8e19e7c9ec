"""A thread prepares the next step: on time, once, without torch's threads; its errors arrive and it ends."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sdlora
from sdlora.training.packing import pack
from sdlora.training.preparation import Preparation, PreparedStep, StepsAhead
from tests.conftest import write_images
from tests.training_runs import config_for, everything, session_for

LAST = 5


class FaultError(Exception):
    pass


def preparing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sdlora-prepare")]


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4),
        st.tuples(
            st.sampled_from([np.float32, np.int64, np.bool_]),
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
        ),
        max_size=6,
    )
)
def test_packed_arrays_are_what_was_packed(kinds: dict[str, tuple[type, tuple[int, ...]]]) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: np.asarray(rng.standard_normal(shape) * 9).astype(dtype) for name, (dtype, shape) in kinds.items()}
    tensors = pack(arrays, torch.device("cpu")).on(torch.device("cpu"))
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        expected = torch.from_numpy(np.array(array))
        assert (tensors[name].dtype, tensors[name].shape) == (expected.dtype, expected.shape)
        assert torch.equal(tensors[name], expected)


def test_the_next_step_is_prepared_without_being_asked_for_and_none_twice(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[tuple[int, str]] = []
    changed, prepare = threading.Condition(), Preparation.prepare

    def noting(self: Preparation, step: int) -> PreparedStep:
        with changed:
            prepared.append((step, threading.current_thread().name))
            changed.notify_all()
        return prepare(self, step)

    monkeypatch.setattr(Preparation, "prepare", noting)
    images = write_images(tmp_path / "set", 3)
    session = session_for(tiny_base, images, tmp_path / "x.safetensors", f"train.steps={LAST + 1}")
    with session.attached():
        for step in range(LAST + 1):
            session.step(step)
            with changed:
                assert changed.wait_for(lambda step=step: len(prepared) == min(step + 1, LAST) + 1, timeout=30)
        assert preparing_threads()
    assert [step for step, _ in prepared] == list(range(LAST + 1))
    assert all(name.startswith("sdlora-prepare") for _, name in prepared)
    assert not preparing_threads()


def test_a_step_can_be_done_again(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a shortage of memory, with smaller parts."""
    images = write_images(tmp_path / "set", 3)
    session = session_for(tiny_base, images, tmp_path / "x.safetensors")
    monkeypatch.setattr("sdlora.training.optimizer.GuardedAdamW.step", lambda *_: None)
    with session.attached():
        for step in (0, 0, 1, 0):
            session.step(step)
            gradients = [parameter.grad.clone() for parameter in session.adapter.parameters]
            again = replace(session, shape=replace(session.shape, micro_batch=1)).step(step).item()
            assert again == pytest.approx(session.step(step).item(), rel=1e-6)
            for parameter, gradient in zip(session.adapter.parameters, gradients, strict=True):
                assert torch.equal(parameter.grad, gradient)


def test_a_fault_in_the_thread_reaches_the_caller_at_its_step(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Preparation.prepare

    def failing(self: Preparation, step: int) -> PreparedStep:
        if step == 2:
            raise FaultError
        return prepare(self, step)

    monkeypatch.setattr(Preparation, "prepare", failing)
    config = config_for(tiny_base, write_images(tmp_path / "set", 3), tmp_path / "x.safetensors", "train.save_every=1")
    with pytest.raises(FaultError):
        sdlora.train(config)
    assert (tmp_path / "x.resume" / "step-00000002.safetensors").exists()
    assert not preparing_threads()


def test_an_interrupted_step_ends_the_thread(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    session = session_for(tiny_base, write_images(tmp_path / "set", 3), tmp_path / "x.safetensors")
    monkeypatch.setattr("sdlora.training.optimizer.GuardedAdamW.step", interrupt)
    with pytest.raises(KeyboardInterrupt), session.attached():
        session.step(0)
    assert not preparing_threads()


class ComputedValues(TorchDispatchMode):
    """The most values that an operator of torch computed at once."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.most = max([self.most, *sizes])
        return result


@pytest.mark.parametrize("text_rate", [0, 1e-4])
def test_preparing_leaves_torchs_threads_alone(tiny_base: Path, tmp_path: Path, text_rate: float) -> None:
    """Torch shares an operator among threads from 32768 values on; the draws of this step have more."""
    images = write_images(tmp_path / "set", 1, sizes=((1024, 1024),))
    more = ("data.resolution=1024", f"optimizer.text_encoder_learning_rate={text_rate}")
    session = session_for(tiny_base, images, tmp_path / "x.safetensors", *more)
    preparation = Preparation(
        plan=session.plan, base=session.base, images=session.images, embeddings=session.embeddings,
        process=0, processes=1,
    )  # fmt: skip
    with ComputedValues() as computed:
        prepared = preparation.prepare(0)
    (inputs,) = prepared.parts(torch.device("cpu"), 1)
    assert inputs.noise.numel() > 32768
    assert computed.most < 1000


def test_processes_prepare_what_one_prepares(tiny_base: Path, tmp_path: Path) -> None:
    session = session_for(tiny_base, None, tmp_path / "x.safetensors", *everything(tmp_path), "train.batch_size=3")

    def parts(process: int, processes: int, step: int) -> list[Any]:
        preparation = Preparation(
            plan=session.plan, base=session.base, images=session.images, embeddings=session.embeddings,
            process=process, processes=processes,
        )  # fmt: skip
        return StepsAhead(preparation, steps=1).take(step).parts(torch.device("cpu"), 1)

    for step in range(6):
        whole = parts(0, 1, step)
        shares = [parts(process, 2, step) for process in range(2)]
        assert [len(share) for share in shares] == [-(-len(whole) // 2), len(whole) // 2]
        for slot, expected in enumerate(whole):
            ours = shares[slot % 2][slot // 2]
            for name in ("latents", "noise", "timesteps", "time_ids", "weights"):
                assert torch.equal(getattr(ours, name), getattr(expected, name))
            assert ours.captions == expected.captions
            assert all(map(torch.equal, ours.token_ids, expected.token_ids))
