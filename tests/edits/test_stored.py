"""Edits on disk: fixed names and bytes for fixed edits, which are read as they were saved."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from replaceme.edits.edits import OUTSIDE, Edits
from replaceme.edits.model_edit import ModelEdit
from replaceme.methods.llm_pruner import RemovedGroups
from replaceme.methods.llm_streamline import TrainedLayer
from replaceme.methods.slicegpt import Slicing

TENSORS = {
    "transform.10": torch.eye(2, dtype=torch.float64),
    "transform.9": torch.full((2, 2), 0.5, dtype=torch.float64),
    "correction.9.mlp_output.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "correction.9.mlp_output.bias": torch.tensor([5.0, 6.0]),
    "correction.9.attention_output.weight": torch.tensor([[7.0], [8.0]]),
    "channels.1": torch.tensor([[1, 0], [2, 3]]),
    "trained.9.mlp.up_proj.weight": torch.tensor([[0.25]]).bfloat16(),
    "trained.-1.model.norm.weight": torch.tensor([0.5]),
    "operator.3": torch.tensor(1.5, dtype=torch.float64),
    "operator.2": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "operator.1": torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64),
}
OF_METHODS: dict[str, tuple[ModelEdit, dict[str, torch.Tensor]]] = {
    "slicing": (
        Slicing([torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])]),
        {"basis.0": torch.tensor([[1.0], [0.0]]), "basis.1": torch.tensor([[0.0], [1.0]])},
    ),
    "removed_groups": (
        RemovedGroups(
            {(10, "attention_output"): torch.tensor([False, True]), (9, "mlp_output"): torch.tensor([True, False])},
            {(10, "self_attn.q_proj"): (4, 2), (9, "mlp.up_proj"): (6, 2)},
        ),
        {"kept.9.mlp_output": torch.tensor([True, False]), "kept.10.attention_output": torch.tensor([False, True])},
    ),
    "trained_layer": (
        TrainedLayer(
            9,
            {"input_layernorm.weight": torch.tensor([0.125]), "mlp.up_proj.weight": torch.tensor([[0.25]]).bfloat16()},
            ("self_attn", "input_layernorm"),
        ),
        {
            "parameter.9.mlp.up_proj.weight": torch.tensor([[0.25]]).bfloat16(),
            "parameter.9.input_layernorm.weight": torch.tensor([0.125]),
        },
    ),
}


def plain_edits() -> Edits:
    """Return edits with every field set but ``model_edit``, and no field in its stored order."""
    T = TENSORS
    return Edits(
        "every kind – at once",
        [4, 5],
        transforms={10: T["transform.10"], 9: T["transform.9"]},
        corrections={
            (9, "mlp_output"): (T["correction.9.mlp_output.weight"], T["correction.9.mlp_output.bias"]),
            (9, "attention_output"): (T["correction.9.attention_output.weight"], None),
        },
        mixtures={9: {11: 0.5, 9: 1.0, 10: -0.5}, 2: {2: 1.0}},
        channels={1: T["channels.1"]},
        parameters={
            (OUTSIDE, "model.norm.weight"): T["trained.-1.model.norm.weight"],
            (9, "mlp.up_proj.weight"): T["trained.9.mlp.up_proj.weight"],
        },
        operators={3: T["operator.3"], 2: T["operator.2"], 1: T["operator.1"].T.contiguous().T},
        config={"num_attention_heads": 2, "head_dim": 4},
        parts="3 of 9 heads",
    )


def comparable(value: Any) -> Any:
    """Return a value with its tensors as lists, to compare with ==."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: comparable(entry) for key, entry in value.items()}
    if isinstance(value, ModelEdit):
        return value.kind, comparable(vars(value))
    return type(value)(map(comparable, value)) if isinstance(value, list | tuple) else value


def assert_saved(edits: Edits, tensors: dict[str, torch.Tensor], folder: Path) -> Edits:
    """Save edits, compare their tensors' file and what is read again, and return that."""
    edits.save(folder)
    save_file(tensors, folder / "expected.safetensors")
    assert (folder / "edits.safetensors").read_bytes() == (folder / "expected.safetensors").read_bytes()
    found = Edits.load(folder)
    for field in dataclasses.fields(edits):
        assert comparable(getattr(found, field.name)) == comparable(getattr(edits, field.name)), field.name
    return found


def test_edits_of_every_kind_are_read_as_they_were_saved(tmp_path: Path) -> None:
    edits = plain_edits()
    assert [field.name for field in dataclasses.fields(edits) if not getattr(edits, field.name)] == ["model_edit"]
    found = assert_saved(edits, TENSORS, tmp_path)
    # A mixture is summed in this order.
    assert [*found.mixtures[9]] == [11, 9, 10]


def test_edits_without_tensors_are_read_as_they_were_saved(tmp_path: Path) -> None:
    assert_saved(Edits("nothing", [1]), {"none": torch.zeros(1)}, tmp_path)


@pytest.mark.parametrize("kind", ModelEdit.KINDS)
def test_an_edit_of_one_method_is_read_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    edit, tensors = OF_METHODS[kind]
    assert_saved(Edits("", [], model_edit=edit), tensors, tmp_path)
