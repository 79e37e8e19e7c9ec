"""PEFT's configuration of an adapter: faults in it are named, and what PEFT cannot hold is not written."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from sdlora.errors import LoraFileError
from sdlora.formats.lora_file import PEFT_WEIGHTS, read_lora
from sdlora.formats.lora_writer import write_lora
from sdlora.formats.peft_settings import Scale, scales_from
from sdlora.formats.safetensors_file import read_header
from sdlora.lora.kinds import Decomposed
from sdlora.lora.low_rank import LowRank

FAULTS = [
    ({"lora_alpha": "16"}, 'lora_alpha is "16"; expected a finite number'),
    ({"lora_alpha": math.nan}, "lora_alpha is NaN; expected"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"lora_alpha": True}, "lora_alpha is true; expected"),
    ({"peft_type": "LOHA", "alpha": [8]}, "alpha is [8]; expected"),
    ({"r": {}}, "r is {}; expected"),
    ({"alpha_pattern": {"to_q": 2, "to_k": None}}, 'alpha_pattern has null for "to_k"; expected a finite number'),
    ({"alpha_pattern": {"to_q": math.inf}}, 'alpha_pattern has Infinity for "to_q"'),
    ({"alpha_pattern": ["to_q", 2]}, 'alpha_pattern is ["to_q", 2]; expected an object'),
    ({"rank_pattern": {"to_q": "x" * 999}}, 'rank_pattern has "xxx'),
]


@pytest.mark.parametrize(("settings", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_an_alpha_or_a_rank_that_is_no_number_is_named(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors = {"x.to_q.lora_A.weight": torch.ones(2, 3), "x.to_q.lora_B.weight": torch.ones(3, 2)}
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / PEFT_WEIGHTS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "x": "unknown"} | settings))
    header = json.dumps({f"unet.{key}": value for key, value in ({"r": 2} | settings).items()})
    in_header = {f"unet.{name}": tensor for name, tensor in tensors.items()}
    save_file(in_header, tmp_path / "x.safetensors", {"lora_adapter_metadata": header})
    for file, start in (
        (tmp_path, tmp_path / "adapter_config.json"), (tmp_path / "x.safetensors", f"{tmp_path / 'x.safetensors'}: unet."),
    ):  # fmt: skip
        with pytest.raises(LoraFileError) as fault:
            read_lora(file)
        assert str(fault.value).startswith(str(start))
        assert said in str(fault.value)
        assert len(str(fault.value)) < 300


def test_all_faults_of_a_configuration_are_named_at_once_and_null_is_none() -> None:
    settings = {"unet": {"lora_alpha": "a", "r": "b"}, "text_encoder": {"alpha_pattern": {"x": "c"}}}
    with pytest.raises(LoraFileError) as fault:
        scales_from(Path("x"), settings)
    assert len(fault.value.problems) == 3
    assert scales_from(Path("x"), {"": {"lora_alpha": None, "r": None}})("to_q") == Scale()


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read as JSON"), ("[1]", "is [1]; expected a JSON object")])
def test_a_header_that_is_no_configuration_is_named(text: str, said: str, tmp_path: Path) -> None:
    tensors = {"unet.x.to_q.lora_A.weight": torch.ones(2, 3), "unet.x.to_q.lora_B.weight": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(LoraFileError, match=f"lora_adapter_metadata {re.escape(said)}"):
        read_lora(tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_peft_would_take_a_plain_module_beside_dora_for_dora() -> None:
    """So a file that mixes them is refused, below."""
    model = nn.ModuleDict({name: nn.Linear(12, 8) for name in ("first", "second")})
    plain, data = copy.deepcopy(model), torch.randn(2, 12)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["first", "second"], use_dora=True), model)
    down, up, magnitude = torch.randn(2, 12), torch.randn(8, 2), torch.rand(8) + 1
    state = {f"{name}.lora_A.weight": down for name in ("first", "second")}
    state |= {f"{name}.lora_B.weight": up for name in ("first", "second")}
    set_peft_model_state_dict(model, state | {"first.lora_magnitude_vector": magnitude})
    change = LowRank(down=down, up=up, alpha=2.0)
    for name, expected in (
        ("first", Decomposed(inner=change, magnitude=magnitude[:, None])),
        ("second", Decomposed(inner=change, magnitude=plain.get_parameter("second.weight").norm(dim=1, keepdim=True))),
    ):
        layer = plain.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight += expected.delta(layer.weight)
        torch.testing.assert_close(model[name](data), layer(data), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_a_part_that_mixes_dora_and_plain_modules_is_refused(format: str, tmp_path: Path) -> None:
    def low_rank(*, zero: bool = False) -> LowRank:
        return LowRank(down=torch.ones(2, 3), up=torch.zeros(3, 2) if zero else torch.ones(3, 2), alpha=2.0)

    dora = Decomposed(inner=low_rank(), magnitude=torch.ones(3, 1))
    file, names = tmp_path / "x.safetensors", [f"unet.x.{name}" for name in ("to_k", "to_q", "to_v")]
    with pytest.raises(
        LoraFileError, match=r"unet or for none; this LoRA has 1 without, such as unet\.x\.to_q, and 1 with"
    ):
        write_lora(file, {names[0]: dora, names[1]: low_rank()}, {}, dtype=torch.float32, format=format)
    assert not file.exists()
    other = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    modules = {names[0]: dora, names[1]: dora, names[2]: low_rank(zero=True), other: low_rank()}
    write_lora(file, modules, {}, dtype=torch.float32, format=format)
    assert set(read_lora(file).modules) == {names[0], names[1], other}
    table = json.loads(read_header(file, LoraFileError).metadata["lora_adapter_metadata"])
    assert (table["unet.use_dora"], table["text_encoder.use_dora"]) == (True, False)


def test_the_order_of_modules_changes_no_byte(tmp_path: Path) -> None:
    """Not where as many have one rank as another, either."""
    ranks = {"unet.x.to_q": 1, "unet.x.to_k": 2}
    modules = {
        name: LowRank(down=torch.ones(rank, 3), up=torch.ones(3, rank), alpha=1.0) for name, rank in ranks.items()
    }
    for name, order in (("a", list(modules)), ("b", list(modules)[::-1])):
        write_lora(tmp_path / name, {key: modules[key] for key in order}, {}, dtype=torch.float32, format="peft")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
