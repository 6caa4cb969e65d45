"""One forward pass over the documents for many observers.

``walk`` runs the documents through layers ``[0, stop]`` and hands signals to observers: a layer's input and output, the outputs
of its attention and its MLP, and the inputs of their last linears. It stops each pass at the last signal that is observed,
computes no logits, and keeps the states of the current batch only.

If all weights are in memory, the model runs one batch after the other. A streamed model (``replaceme.models.streaming``) runs
all batches through a layer before it reads the next one, so that each layer is read once; a scratch file keeps the states and
what observers store in ``batch.scratch``. So an observer can rely on two things only: a batch passes the layers in ascending
order, and ``batch.scratch`` keeps tensors from one layer to a later one. A walk can start at a later layer, with states that an
earlier walk has recorded.

Several processes share a walk (``replaceme.base.group``) if each of its observers is ``Reducible``: each process takes its part
of the batches, and at the end each observer sums its results over the processes. Otherwise, each process takes the whole walk.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from replaceme.base.documents import Batch
from replaceme.base.group import WHOLE, shard
from replaceme.base.progress import progress
from replaceme.base.scratch import ScratchFile
from replaceme.models.context import ModelContext
from replaceme.models.families import decoder_of
from replaceme.models.layers import EntryState, input_of, start_at_layer, tensor_of
from replaceme.models.streaming import stream_of

# ``…_features`` are the inputs of the last linear of the attention or the MLP.
Signal = Literal["input", "attention_features", "attention", "mlp_features", "mlp", "output"]
Signals = Mapping[Signal, Tensor]


class Observer(Protocol):
    """Reads states during a walk."""

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        """Return the signals it reads: layer → signals."""
        ...

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        """Receive the signals of one layer for one batch, each (documents, longest, width), padding included."""
        ...


@runtime_checkable
class Reducible(Observer, Protocol):
    """An observer whose results can be summed over processes that share a walk."""

    def all_reduce(self) -> None:
        """Add the results of the other processes, after a shared walk (``replaceme.base.group``)."""
        ...


class _LastSignalReachedError(Exception):
    """Ends a forward pass after the last observed signal."""


def walk(
    context: ModelContext, observers: Sequence[Observer], *, description: str | None, start: EntryState | None = None
) -> None:
    """Run the documents through the model once, up to the last signal that an observer reads.

    Args:
        context: the model, the documents and the batch size.
        observers: what reads the signals.
        description: text of the progress bar; None shows no bar.
        start: a later layer to start at; None is the first layer.
    """
    if not (signals_by_layer := _signals_by_layer(observers)):
        return
    reducible = [observer for observer in observers if isinstance(observer, Reducible)]
    part = shard() if len(reducible) == len(observers) else WHOLE
    batches: Iterable[Batch] = context.documents.batches(context.batch_size, str(next(context.model.parameters()).device), part)
    with torch.inference_mode():
        if stream_of(context.model) is not None:
            with _scratch_on_disk(batches, context.folder) as waiting:
                _walk_by_layer(context, waiting, observers, max(signals_by_layer), description, start)
        else:
            if description is not None:
                batches = progress(
                    batches, description, "batches", total=context.documents.batch_count(context.batch_size, part)
                )
            with _Tap(context, signals_by_layer, observers, start) as tap:
                for batch in batches:
                    tap.run(batch)
        if part != WHOLE:
            for observer in reducible:
                observer.all_reduce()


def _signals_by_layer(observers: Iterable[Observer]) -> dict[int, set[Signal]]:
    union: dict[int, set[Signal]] = {}
    for observer in observers:
        for layer, signals in observer.signals().items():
            union.setdefault(layer, set()).update(signals)
    return union


@contextmanager
def _scratch_on_disk(batches: Iterable[Batch], folder: Path | None) -> Iterator[list[Batch]]:
    """Yield batches whose scratch lies in a file."""
    with ScratchFile(folder) as file:
        yield [replace(batch, scratch=file.mapping()) for batch in batches]


def _walk_by_layer(
    context: ModelContext,
    batches: Sequence[Batch],
    observers: Sequence[Observer],
    stop: int,
    description: str | None,
    start: EntryState | None,
) -> None:
    """Run all batches through a layer before the next one, up to the last signal; carry their states up to ``stop``."""
    first = start.layer if start else 0
    observers = [*observers, _CarryStates(range(first, stop))]
    signals_by_layer = _signals_by_layer(observers)
    numbers = range(first, max(signals_by_layer) + 1)
    for layer in numbers if description is None or len(numbers) == 1 else progress(numbers, description, "layers"):
        begin = start if layer == first else EntryState(layer, None)
        with _Tap(context, {layer: signals_by_layer[layer]}, observers, begin) as tap:
            for batch in batches:
                tap.run(batch)


class _CarryStates:
    """Observer that stores each batch's states, padding included, for the next layer (``EntryState.states`` is None)."""

    def __init__(self, layers: range):
        self.layers = layers

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return signals_for(self.layers, "output")

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        batch.scratch["carried"] = signals["output"]


@contextmanager
def forward_passes(context: ModelContext, batches: Iterable[Batch], start: EntryState | None) -> Iterator[Iterator[Batch]]:
    """Yield the batches, once, for whole forward passes of the model inside the block.

    A streamed model moves all of them up to its last layer first, each layer read once; each pass then computes the rest.

    Args:
        context: a causal language model, with whatever hooks.
        batches: the batches; a pass has to run on the ``input_ids`` of the one yielded last.
        start: a later layer to start at; None is the first layer.
    """
    last, current = len(context.layers) - 1, list[Batch]()

    def in_turn() -> Iterator[Batch]:
        for batch in batches:
            current[:] = [batch]
            yield batch

    with ExitStack() as stack:
        if stream_of(context.model) is not None and (start.layer if start else 0) < last:
            batches = waiting = stack.enter_context(_scratch_on_disk(batches, context.folder))
            with torch.inference_mode():
                _walk_by_layer(context, waiting, [], last, None, start)
            start = EntryState(last, None)
        if start is not None:
            stack.enter_context(start_at_layer(context.family, context.layers, start, lambda: current[0]))
        yield in_turn()


class _Tap:
    """Hooks on the observed layers; hands a layer's signals to its observers as soon as all of them are there."""

    def __init__(
        self,
        context: ModelContext,
        signals_by_layer: Mapping[int, set[Signal]],
        observers: Sequence[Observer],
        start: EntryState | None,
    ):
        self.model, self.layers, self.family = context.model, context.layers, context.family
        self.signals, self.start = signals_by_layer, start
        self.listeners = {layer: [each for each in observers if layer in each.signals()] for layer in signals_by_layer}
        self.stop = max(signals_by_layer)
        self.batch: Batch | None = None
        self.received: dict[Signal, Tensor] = {}

    def run(self, batch: Batch) -> None:
        self.batch, self.received = batch, {}
        try:
            # Padding comes after the text, so the real tokens of a causal model never attend to it: no mask is needed.
            decoder_of(self.model)(input_ids=batch.input_ids, use_cache=False)
        except _LastSignalReachedError:
            pass
        finally:
            self.batch = None

    def __enter__(self) -> "_Tap":
        with ExitStack() as stack:
            if self.start is not None:
                stack.enter_context(start_at_layer(self.family, self.layers, self.start, lambda: self.batch))
            for layer, signals in self.signals.items():
                for signal in signals:
                    stack.callback(self._hook(layer, signal).remove)
            self.hooks = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()

    def _hook(self, index: int, signal: Signal) -> Any:
        layer, family = self.layers[index], self.family

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._take(index, signal, input_of(args, kwargs))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            states = tensor_of(output)
            if signal in ("attention", "mlp"):
                states = states * family.multiplier if family.multiplier != 1 else states
                states = states.clone() if family.adds_in_place else states
            self._take(index, signal, states)

        inputs = {
            "input": lambda: layer,
            "attention_features": lambda: family.linear_of(layer, "attention_output"),
            "mlp_features": lambda: family.linear_of(layer, "mlp_output"),
        }
        if signal in inputs:
            return inputs[signal]().register_forward_pre_hook(before, with_kwargs=True)
        outputs = {"attention": family.attention, "mlp": family.mlp, "output": ""}
        return layer.get_submodule(outputs[signal]).register_forward_hook(after)

    def _take(self, layer: int, signal: Signal, states: Tensor) -> None:
        assert self.batch is not None
        # Some layers and most experts take all tokens in one row. The layers of a large model may be on several devices:
        # observers get all states on one.
        self.received[signal] = states.reshape(*self.batch.input_ids.shape, -1).to(self.batch.input_ids.device)
        if len(self.received) < len(self.signals[layer]):
            return
        signals, self.received = self.received, {}
        for observer in self.listeners[layer]:
            observer.observe(layer, signals, self.batch)
        if layer == self.stop:
            raise _LastSignalReachedError


class RecordStates:
    """Observer that writes the sum of some signals of a layer into ``states`` (tokens, d), in the order of the walk.

    In a walk that processes share, each records the states of its own part.
    """

    def __init__(self, layer: int, summands: tuple[Signal, ...], states: Tensor):
        self.layer, self.summands, self.states = layer, summands, states

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return {self.layer: frozenset(self.summands)}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        self.states[batch.tokens] = sum_tensors(batch.real(signals[name]) for name in self.summands).to(self.states)

    def all_reduce(self) -> None:
        pass


def sum_tensors(parts: Iterable[Tensor]) -> Tensor:
    """Return the sum of states of one shape."""
    return reduce(torch.add, parts)


def signals_for(layers: Iterable[int], *signals: Signal) -> dict[int, frozenset[Signal]]:
    """Return what ``signals`` returns for the same signals of several layers."""
    return {layer: frozenset(signals) for layer in layers}
