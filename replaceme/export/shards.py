"""Save a streamed model: file by file and tensor by tensor, each as soon as it is computed. The bytes are those of safetensors.

transformers decides what a file holds, from tensors on the meta device. The parameters of one layer at a time are read, edited
and converted to the form of the files (experts are stored one by one). Only a layer's experts can be divided between files in
another way than for a resident model, where transformers counts the bytes of one of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from replaceme.edits.edits import Edits
from replaceme.edits.fold import edited_parameters, shorten
from replaceme.models.families import Family, in_torch_layout, inputs_of
from replaceme.models.streaming import free, loaded

# Names of formats in safetensors, which sorts the tensors of a file from the last of these to the first, then by name.
NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
RANK = {dtype: rank for rank, dtype in enumerate(NAMES)}


def save_streamed(model: Any, family: Family, edits: Edits, folder: Path, max_shard_size: str) -> None:
    """Apply edits to a streamed model and save it; it can't be run afterwards.

    Args:
        model: the dense model, each weight in the dtype that it is stored in.
        family: its description.
        edits: the changes, without bases and removed groups.
        folder: where the files go.
        max_shard_size: of a weight file, in transformers' words.
    """
    layers = shorten(model, family, edits)
    parts = _Parts(model, family, layers, edits)

    def write(tensors: dict[str, Tensor], file: str, metadata: Mapping[str, str]) -> None:
        _write(Path(file), tensors, parts, metadata)

    with mock.patch("transformers.modeling_utils.safe_save_file", write):
        model.save_pretrained(folder, state_dict=_shapes(model, family, layers, edits), max_shard_size=max_shard_size)


def _shapes(model: Any, family: Family, layers: nn.ModuleList, edits: Edits) -> dict[str, Tensor]:
    """Return the shortened model's state, in which MLPs with fewer channels have their new shapes."""
    state = dict(model.state_dict())
    for at, channels in edits.channels.items():
        count = inputs_of(family.linear_of(layers[at], "mlp_output"))
        for name, dimension in family.cut_parameters(layers[at], "mlp_output").items():
            own = f"{family.layers}.{edits.position(at)}.{name}"
            shape = [*in_torch_layout(model, own, state[own]).shape]
            shape[dimension] = shape[dimension] // count * len(channels)
            made = torch.empty(shape, dtype=state[own].dtype, device="meta")
            state[own] = in_torch_layout(model, own, made)
    return state


class _Parts:
    """The parameters of the shortened model in the form of the files, one layer at a time."""

    def __init__(self, model: Any, family: Family, layers: nn.ModuleList, edits: Edits):
        self.model, self.family, self.layers, self.edits = model, family, layers, edits
        kept = [at for at in range(len(layers)) if at not in set(edits.removed_layers)]
        # Name in the files → layer of the dense model.
        self.layer_of = {name: at for at in kept for name in self._in_files(self._own(at))}
        self.made: tuple[int, dict[str, Tensor]] = -1, {}

    def value(self, name: str) -> Tensor:
        """Return a parameter by its name in the files."""
        at = self.layer_of[name]
        if self.made[0] != at:
            self.made = -1, {}
            # None is needed again.
            free(self.model)
            with loaded([self.layers[at]]):
                own = self._own(at)
                for edited, exact in edited_parameters(self.model, self.family, self.layers, self.edits, at):
                    own[edited] = in_torch_layout(self.model, edited, exact).to(own[edited].dtype)
                self.made = at, self._in_files(own)
        return self.made[1][name]

    def _own(self, at: int) -> dict[str, Tensor]:
        prefix = f"{self.family.layers}.{self.edits.position(at)}."
        return dict(self.layers[at].state_dict(prefix=prefix))

    def _in_files(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.model, own))


def _write(file: Path, tensors: Mapping[str, Tensor], parts: _Parts, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; tensors on the meta device are taken from ``parts``, one at a time."""
    names = sorted(tensors, key=lambda name: (-RANK[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].itemsize
        header[name] = {
            "dtype": NAMES[tensors[name].dtype], "shape": [*tensors[name].shape], "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = parts.value(name) if tensors[name].is_meta else tensors[name]
            assert (value.shape, value.dtype) == (tensors[name].shape, tensors[name].dtype), name
            stream.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
