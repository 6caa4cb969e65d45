"""Training of one decoder layer alone: stored states in, stored states out. No other layer computes or needs a gradient.

The loss is the mean of ``(layer(x) − y)²`` over the real tokens of a few documents and the d entries of each. Documents are
whole, so that the attention sees the same context as in the model.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as trees

from replaceme.base.documents import Batch, Documents
from replaceme.models.families import Family, decoder_of
from replaceme.models.layers import silence_attention, skip_layers, tensor_of
from replaceme.training.training import Texts


@dataclass(frozen=True)
class LayerLesson:
    """The training data and the loss of a layer.

    Attributes:
        model: the dense model.
        family: its description.
        layer: the layer's position.
        documents: the text.
        inputs: (tokens, d) states that enter the layer, in the order of a walk.
        targets: (tokens, d) states that should leave it.
        without: paths in the layer of an attention that is left out, and of the norm before it; empty keeps both.
    """

    model: Any
    family: Family
    layer: int
    documents: Documents
    inputs: Tensor
    targets: Tensor
    without: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """The layer; its weights stay unchanged."""
        return self.family.decoder_layers(self.model)[self.layer]

    @cached_property
    def texts(self) -> Texts:
        """The text, as batches."""
        return Texts(self.documents, next(self.module.parameters()).device)

    @cached_property
    def fixed(self) -> dict[str, Tensor]:
        """The layer's buffers and untrained weights, in float32."""
        kept = {name: value.detach() for name, value in self.module.named_parameters() if self._gone(name)}
        return {name: self._here(value) for name, value in {**kept, **dict(self.module.named_buffers())}.items()}

    def learners(self) -> dict[str, Tensor]:
        """Return float32 copies of the layer's parameters to train, by name."""
        return {
            name: parameter.detach().float().clone().requires_grad_()
            for name, parameter in self.module.named_parameters()
            if not self._gone(name)
        }

    def begun(self) -> AbstractContextManager[None]:
        """Silence the attention inside the block, if this lesson leaves it out."""
        return silence_attention(self.module.get_submodule(self.without[0])) if self.without else nullcontext()

    def loss(self, parameters: Mapping[str, Tensor], documents: Sequence[int], step: int | None = None) -> Tensor:
        """Return the mean squared error, over the real tokens of documents, with the given parameters."""
        batch = self.texts.batch(documents)
        found = batch.real(self.states(parameters, batch, self.texts.rows(self.inputs, documents).float()))
        return (found - self.texts.rows(self.targets, documents).float()).square().mean()

    def states(self, parameters: Mapping[str, Tensor], batch: Batch, rows: Tensor) -> Tensor:
        """Return the layer's output (documents, longest, d) for the input ``rows`` (tokens, d)."""
        args, kwargs = trees.tree_map(self._here, arguments(self, batch))
        entering = batch.padded(rows)
        args, kwargs = ((entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entering})
        return tensor_of(functional_call(self.module, {**parameters, **self.fixed}, args, kwargs))

    def _gone(self, name: str) -> bool:
        return name.startswith(tuple(f"{path}." for path in self.without))

    def _here(self, given: Any) -> Any:
        if not isinstance(given, Tensor):
            return given
        return given.to(self.texts.device, torch.float32 if given.is_floating_point() else given.dtype)


class _ReachedError(Exception):
    """Ends a forward pass before the layer."""


@torch.no_grad()
def arguments(lesson: LayerLesson, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the model's call of the layer on a batch; the layers before it compute nothing."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, kwargs))
        raise _ReachedError

    layers = lesson.family.decoder_layers(lesson.model)
    handle = lesson.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with skip_layers(lesson.family, layers[: lesson.layer]):
            first = next(lesson.model.parameters()).device
            decoder_of(lesson.model)(input_ids=batch.input_ids.to(first), use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return given[0]
