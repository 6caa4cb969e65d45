"""Groups of parameters that go together, and which of them matter least (LLM-Pruner, arXiv 2305.11627, section 3).

A group is a key/value head with its queries (their rows, and the columns of the output projection that read them) or a channel
of the MLP (its rows in front, and its column of the last linear). What a layer adds to the residual stream is a sum over its
groups, so that the others don't change when one goes. How much one matters is told by the first order of the loss,

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
from replaceme.models.layers import gradients_for

# The texts of the backward pass (section 4.1), and the seed of their choice.
CROPS, LENGTH, SEED = 10, 64, 0

Importance = Mapping[tuple[int, Linear], Tensor]


@dataclass(frozen=True)
class Width:
    """What can go: groups of attention and MLP, so many from each of some layers.

    Attributes:
        layers: these layers.
        groups: how many groups each has.
        sizes: parameters of a group.
        layer_size: parameters of a whole layer.
    """

    layers: range
    groups: Mapping[Linear, int]
    sizes: Mapping[Linear, int]
    layer_size: int

    def parameters(self, removed: Mapping[Linear, int]) -> int:
        """Return the parameters that go, over all the layers, with so many groups of each."""
        return len(self.layers) * sum(count * self.sizes[linear] for linear, count in removed.items())

    @property
    def most(self) -> int:
        """How many whole layers' parameters can go at most: a head and a channel of each layer stay."""
        return self.parameters({linear: count - 1 for linear, count in self.groups.items()}) // self.layer_size

    def choose(self, skip: int, fits: Callable[[Mapping[Linear, int]], bool] = lambda kept: True) -> dict[Linear, int]:
        """Return how many groups go from each layer, so that about as many parameters do as whole layers have.

        The same share of both, but for rounding: heads are rounded to the nearest, at least one where it is not too much,
        and channels make up for the rest.

        Args:
            skip: the number of whole layers.
            fits: whether a model can have what is kept.

        Raises:
            ParameterError: that many can't go.
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
    """Return what can go from some layers of a model, whose weights need not be there."""
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
    """Return how much each group matters, and the loss that tells it.

    Each gradient is used and let go as soon as it is there, so that no more than one is held; the pass back ends at the first
    of the layers.

    Args:
        model: loaded; it is left as it was found.
        family: where its parts are.
        wanted: of which layers it is wanted.
        groups: how many groups each has in front of each linear.
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
        stack.enter_context(gradients_for(model, (weight for weight, _, _ in cuts)))
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
    """Return which groups stay, (groups,) bool, when the ``count`` least important ones go; the first of equals."""
    kept = torch.ones(len(importance), dtype=torch.bool)
    kept[importance.argsort(stable=True)[:count]] = False
    return kept


def shapes_of(family: Family, layers: nn.ModuleList, edits: Edits) -> dict[tuple[int, str], tuple[int, int]]:
    """Return the outputs and inputs that are left of each linear that loses some, by its layer and its path within it."""
    shapes = {}
    for (layer, linear), groups in edits.kept.items():
        for name, dimension in family.cut_parameters(layers[layer], linear).items():
            path, _, kind = name.rpartition(".")
            if kind == "weight":
                shape = [*parameter_of(layers[layer], name).shape]
                shape[dimension] = int(features_of(groups, shape[dimension]).sum())
                shapes[layer, path] = (shape[0], shape[1])
    return shapes
