"""Edits on disk: fixed bytes for fixed edits, which are read as they were saved."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from replaceme.edits.edits import Edits

TENSORS = {
    "transform.10": torch.eye(2, dtype=torch.float64),
    "transform.9": torch.full((2, 2), 0.5, dtype=torch.float64),
    "correction.9.mlp_output.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "correction.9.mlp_output.bias": torch.tensor([5.0, 6.0]),
    "correction.9.attention_output.weight": torch.tensor([[7.0], [8.0]]),
    "channels.1": torch.tensor([[1, 0], [2, 3]]),
    "operator.3": torch.tensor(1.5, dtype=torch.float64),
    "operator.2": torch.tensor([1.0, 2.0], dtype=torch.float64),
    "operator.1": torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64),
    "parameter.9.mlp.up_proj.weight": torch.tensor([[0.25]], dtype=torch.bfloat16),
    "parameter.9.input_layernorm.weight": torch.tensor([0.125]),
    "basis.0": torch.tensor([[1.0], [0.0]]),
    "basis.1": torch.tensor([[0.0], [1.0]]),
    "kept.9.mlp_output": torch.tensor([True, False]),
    "kept.10.attention_output": torch.tensor([False, True]),
}
JSON = """{
  "bases": 2,
  "channels": [
    1
  ],
  "config": {
    "head_dim": 4,
    "num_attention_heads": 2
  },
  "corrections": [
    [
      9,
      "attention_output"
    ],
    [
      9,
      "mlp_output"
    ]
  ],
  "kept": [
    [
      9,
      "mlp_output"
    ],
    [
      10,
      "attention_output"
    ]
  ],
  "mixtures": [
    [
      2,
      [
        [
          2,
          1.0
        ]
      ]
    ],
    [
      9,
      [
        [
          11,
          0.5
        ],
        [
          9,
          1.0
        ],
        [
          10,
          -0.5
        ]
      ]
    ]
  ],
  "operators": [
    1,
    2,
    3
  ],
  "parameters": [
    [
      9,
      "input_layernorm.weight"
    ],
    [
      9,
      "mlp.up_proj.weight"
    ]
  ],
  "parts": "3 of 9 heads",
  "removed_layers": [
    4,
    5
  ],
  "shapes": [
    [
      9,
      "self_attn.q_proj",
      4,
      2
    ],
    [
      10,
      "mlp.up_proj",
      6,
      2
    ]
  ],
  "title": "every kind – at once",
  "transforms": [
    9,
    10
  ],
  "without_attention": [
    [
      1,
      "self_attn",
      "input_layernorm"
    ],
    [
      3,
      "attn",
      "ln_1"
    ]
  ]
}
"""


def of_every_kind() -> Edits:
    """Return edits with every field set and no field in its stored order."""
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
        operators={3: T["operator.3"], 2: T["operator.2"], 1: T["operator.1"].T.contiguous().T},
        parameters={
            (9, "mlp.up_proj.weight"): T["parameter.9.mlp.up_proj.weight"],
            (9, "input_layernorm.weight"): T["parameter.9.input_layernorm.weight"],
        },
        without_attention={3: ("attn", "ln_1"), 1: ("self_attn", "input_layernorm")},
        bases=[T["basis.0"], T["basis.1"]],
        kept={(10, "attention_output"): T["kept.10.attention_output"], (9, "mlp_output"): T["kept.9.mlp_output"]},
        shapes={(10, "mlp.up_proj"): (6, 2), (9, "self_attn.q_proj"): (4, 2)},
        config={"num_attention_heads": 2, "head_dim": 4},
        parts="3 of 9 heads",
    )


def test_edits_of_every_kind_give_these_bytes(tmp_path: Path) -> None:
    edits = of_every_kind()
    assert all(getattr(edits, field.name) for field in dataclasses.fields(edits)), "a field is not tested"
    edits.save(tmp_path)
    save_file(TENSORS, tmp_path / "expected.safetensors")
    assert (tmp_path / "edits.json").read_text(encoding="utf-8") == JSON
    assert (tmp_path / "edits.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_edits_without_tensors_give_these_bytes(tmp_path: Path) -> None:
    Edits("nothing", [1]).save(tmp_path)
    save_file({"none": torch.zeros(1)}, tmp_path / "expected.safetensors")
    assert (tmp_path / "edits.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert Edits.load(tmp_path) == Edits("nothing", [1])


def plain(value: Any) -> Any:
    """Return a value with its tensors as lists, to compare with ==."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


def test_edits_of_every_kind_are_read_as_they_were_saved(tmp_path: Path) -> None:
    edits = of_every_kind()
    edits.save(tmp_path)
    found = Edits.load(tmp_path)
    for field in dataclasses.fields(edits):
        assert plain(getattr(found, field.name)) == plain(getattr(edits, field.name)), field.name
    # A mixture is summed in this order.
    assert [*found.mixtures[9]] == [11, 9, 10]
