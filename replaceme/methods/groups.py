"""Groups of coupled parameters and their importance (LLM-Pruner, arXiv 2305.11627, section 3).

A group is a key/value head with its queries (their rows, and the columns of the output projection that read them) or a channel
of the MLP (its rows of the first linears and its column of the last one). A layer's output is a sum over its groups, so that
removing one leaves the others unchanged. The importance is a first-order estimate of the change of the loss,

    importance = Σ |w · ∂L/∂w|  over the weights of the group,

after one backward pass over a few short texts. Each layer loses the same numbers of heads and channels, its least important
ones.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.base.compute import require_resident
from replaceme.base.documents import Documents, seeded_order
from replaceme.base.errors import ParameterError
from replaceme.edits.edits import Edits, features_of
from replaceme.models.families import Family, Linear, inputs_of, parameter_of
from replaceme.models.layers import enable_gradients

# Texts of the backward pass and tokens of each (section 4.1), and the seed of their choice.
CROPS, LENGTH, SEED = 10, 64, 0

Importance = Mapping[tuple[int, Linear], Tensor]


@dataclass(frozen=True)
class Width:
    """The groups of attention and MLP that can be removed, the same from each of some layers.

    Attributes:
        layers: the layers.
        groups: number of groups in a layer, by linear.
        sizes: number of parameters in a group, by linear.
        layer_size: number of parameters in a layer.
    """

    layers: range
    groups: Mapping[Linear, int]
    sizes: Mapping[Linear, int]
    layer_size: int

    def parameters(self, removed: Mapping[Linear, int]) -> int:
        """Return the number of parameters in these groups, over all the layers."""
        return len(self.layers) * sum(count * self.sizes[linear] for linear, count in removed.items())

    @property
    def most(self) -> int:
        """The largest removable number of parameters, in whole layers: a head and a channel of each layer stay."""
        return self.parameters({linear: count - 1 for linear, count in self.groups.items()}) // self.layer_size

    def choose(self, skip: int, fits: Callable[[Mapping[Linear, int]], bool] = lambda kept: True) -> dict[Linear, int]:
        """Return how many groups to remove from each layer, to match the parameters of whole layers.

        Heads and channels lose the same share, but for rounding: heads are rounded to the nearest number, at least one where
        that is not too much, and channels make up for the difference.

        Args:
            skip: the number of whole layers.
            fits: whether a model can have the kept groups.

        Raises:
            ParameterError: so many parameters can't be removed.
        """
        wanted = skip * self.layer_size / len(self.layers)
        heads, channels = self.groups["attention_output"], self.groups["mlp_output"]
        nearest = heads * wanted * len(self.layers) / self.parameters(self.groups)
        counts = {
            cut: round((wanted - cut * self.sizes["attention_output"]) / self.sizes["mlp_output"]) for cut in range(heads)
        }
        possible = [cut for cut, rest in counts.items() if 0 <= rest < channels]
        if not possible:
            raise ParameterError(
                f"layers_to_skip: {skip} layers have more parameters than the heads and channels of layers "
                f"{self.layers[0]}–{self.layers[-1]} can lose; use {self.most} at most."
            )
        for cut in sorted(possible, key=lambda cut: (cut == 0, abs(cut - nearest))):
            if fits({"attention_output": heads - cut, "mlp_output": channels - counts[cut]}):
                return {"attention_output": cut, "mlp_output": counts[cut]}
        raise ParameterError(
            "plain: the family's own config can't say what would be left of its layers' heads and channels; use false."
        )


def width_of(model: Any, family: Family, layers: range) -> Width:
    """Return the removable groups of some layers; the model's weights need not be loaded."""
    layer, config = family.decoder_layers(model)[layers[0]], model.config
    groups: dict[Linear, int] = {
        "attention_output": int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        "mlp_output": inputs_of(family.linear_of(layer, "mlp_output")),
    }
    sizes = {
        linear: sum(parameter_of(layer, name).numel() for name in family.cut_parameters(layer, linear)) // count
        for linear, count in groups.items()
    }
    return Width(layers, groups, sizes, sum(parameter.numel() for parameter in layer.parameters()))


def crops_of(documents: Documents) -> Tensor:
    """Return pieces of the documents, (10, 64) token ids, in a seeded choice.

    Raises:
        ParameterError: there are not so many.
    """
    pieces = [piece for document in documents.documents for piece in document.split(LENGTH) if len(piece) == LENGTH]
    if len(pieces) < CROPS:
        raise ParameterError(
            f"dataset_size: the calibration text has {len(pieces)} pieces of {LENGTH} tokens, and method llm_pruner takes "
            f"{CROPS}; use more documents, or longer ones (max_length)."
        )
    return torch.stack([pieces[index] for index in seeded_order(len(pieces), SEED)[:CROPS].tolist()])


def importance_of(
    model: Any, family: Family, wanted: Sequence[int], groups: Mapping[Linear, int], crops: Tensor
) -> tuple[Importance, float]:
    """Return the importance of each group, and the loss whose gradients give it.

    Each gradient is used and freed as soon as it is computed, so that only one is held; the backward pass ends at the first of
    the layers.

    Args:
        model: the loaded model; it is left unchanged.
        family: where its parts are.
        wanted: the layers.
        groups: number of groups in a layer, by the linear that reads them.
        crops: (texts, tokens) ids.

    Raises:
        ModelError: weights of these layers are not on a device.
        ParameterError: the numbers overflow.
    """
    layers = family.decoder_layers(model)
    require_resident({layer: layers[layer] for layer in wanted}, "whose gradients are wanted")
    found: dict[tuple[int, Linear], Tensor] = {
        (layer, linear): torch.zeros(count, dtype=torch.float64) for layer in wanted for linear, count in groups.items()
    }

    def adding(total: Tensor, dimension: int) -> Callable[[nn.Parameter], None]:
        def add(weight: nn.Parameter) -> None:
            assert weight.grad is not None
            felt = (weight.detach().float() * weight.grad.float()).abs()
            total.add_(felt.movedim(dimension, 0).reshape(len(total), -1).sum(dim=1, dtype=torch.float64).cpu())
            weight.grad = None

        return add

    cuts = [
        (layers[layer].get_parameter(name), total, dimension)
        for (layer, linear), total in found.items()
        for name, dimension in family.cut_parameters(layers[layer], linear).items()
    ]
    with ExitStack() as stack:
        stack.enter_context(enable_gradients(model, (weight for weight, _, _ in cuts)))
        for weight, total, dimension in cuts:
            stack.callback(weight.register_post_accumulate_grad_hook(adding(total, dimension)).remove)
        stack.enter_context(torch.enable_grad())
        ids = crops.to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    if not all(bool(total.isfinite().all()) for total in found.values()):
        raise ParameterError("dtype: the model's gradients overflow; use float32.")
    return found, float(loss.detach())


def least(importance: Tensor, count: int) -> Tensor:
    """Return which groups stay, (groups,) bool, without the ``count`` least important ones; of equals, the first go."""
    kept = torch.ones(len(importance), dtype=torch.bool)
    kept[importance.argsort(stable=True)[:count]] = False
    return kept


def shapes_of(family: Family, layers: nn.ModuleList, edits: Edits) -> dict[tuple[int, str], tuple[int, int]]:
    """Return the remaining outputs and inputs of each cut linear, by its layer and its path in the layer."""
    shapes = {}
    for (layer, linear), groups in edits.kept.items():
        for name, dimension in family.cut_parameters(layers[layer], linear).items():
            path, _, kind = name.rpartition(".")
            if kind == "weight":
                shape = [*parameter_of(layers[layer], name).shape]
                shape[dimension] = int(features_of(groups, shape[dimension]).sum())
                shapes[layer, path] = (shape[0], shape[1])
    return shapes
