"""One pass over the documents, many observers.

``walk`` sends the documents through layers ``[0, stop)`` and hands what passes to observers: the state that enters a
layer, what its MLP adds, the state that leaves it. It ends each pass at the last layer that anybody observes, computes no
logits, and keeps no states but those of the batch at hand.

The order of work is the driver's business: now batch by batch through resident weights. An observer may rely on two
things alone: within a batch, layers come in ascending order, and what it must carry from one layer to a later one goes
into ``batch.scratch``. So a walk layer by layer, with scratch on disk, needs no change in any observer.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from replaceme.documents import Batch, Documents
from replaceme.families import Family, decoder_of
from replaceme.progress import progress

Signal = Literal["input", "mlp", "output"]
Signals = Mapping[Signal, Tensor]


class Observer(Protocol):
    """Something that looks at states as they pass."""

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        """Return which signals of which layers it wants."""
        ...

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        """Take the signals of one layer for one batch; each is (documents, longest, width), padding included."""
        ...


class _LastLayerReachedError(Exception):
    """Ends a forward pass behind the last observed layer."""


def walk(
    model: nn.Module,
    family: Family,
    documents: Documents,
    observers: Sequence[Observer],
    *,
    batch_size: int,
    description: str,
) -> None:
    """Run the documents through the model once, up to the last layer that an observer wants.

    Args:
        model: a causal language model; its own device is used.
        family: where its parts are.
        documents: what to run.
        observers: who looks.
        batch_size: documents in a batch.
        description: what the progress bar says.
    """
    wanted: dict[int, set[Signal]] = {}
    for observer in observers:
        for layer, signals in observer.wants().items():
            wanted.setdefault(layer, set()).update(signals)
    if not wanted:
        return
    tap = _Tap(family.decoder_layers(model), family, wanted, observers)
    batches = documents.batches(batch_size, str(next(model.parameters()).device))
    with torch.inference_mode(), tap:
        for batch in progress(batches, description, "batches", total=documents.batch_count(batch_size)):
            tap.run(model, batch)


class _Tap:
    """Hooks on the wanted layers; hands each layer's signals on as soon as the layer is done."""

    def __init__(self, layers: nn.ModuleList, family: Family, wanted: Mapping[int, set[Signal]], observers: Sequence[Observer]):
        self.layers, self.family, self.wanted = layers, family, wanted
        self.listeners = {layer: [each for each in observers if layer in each.wants()] for layer in wanted}
        self.stop = max(wanted)
        self.batch: Batch | None = None
        self.seen: dict[Signal, Tensor] = {}

    def run(self, model: nn.Module, batch: Batch) -> None:
        self.batch = batch
        try:
            # Padding stands behind the text, where no real token of a causal model sees it: no mask is needed.
            decoder_of(model)(input_ids=batch.input_ids, use_cache=False)
        except _LastLayerReachedError:
            pass
        finally:
            self.batch = None

    def __enter__(self) -> "_Tap":
        with ExitStack() as stack:
            for index, signals in self.wanted.items():
                layer = self.layers[index]
                if "input" in signals:
                    stack.callback(layer.register_forward_pre_hook(self._keep_input, with_kwargs=True).remove)
                if "mlp" in signals:
                    stack.callback(self.family.mlp_of(layer).register_forward_hook(self._keep_mlp).remove)
                stack.callback(layer.register_forward_hook(self._layer_done(index)).remove)
            self.hooks = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()

    def _keep_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen["input"] = args[0] if args else kwargs["hidden_states"]

    def _keep_mlp(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.seen["mlp"] = tensor_of(output)

    def _layer_done(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            assert self.batch is not None
            self.seen["output"] = tensor_of(output)
            for observer in self.listeners[index]:
                observer.observe(index, self.seen, self.batch)
            self.seen = {}
            if index == self.stop:
                raise _LastLayerReachedError

        return hook


def tensor_of(output: Any) -> Tensor:
    """Return the state in a module's output, which some families wrap in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def ask(layers: Iterable[int], *signals: Signal) -> dict[int, frozenset[Signal]]:
    """Return the wish for the same signals of several layers."""
    return {layer: frozenset(signals) for layer in layers}
