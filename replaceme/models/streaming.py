"""Stream a model whose layers don't fit in memory: a layer's weights are loaded from their files when its turn comes.

What is outside the decoder layers (embeddings, the last norm, the head) stays in memory. The layers' parameters are
``LazyParameter`` on the meta device. A layer's ``forward`` first loads them. When they and those of other layers exceed the
budget, the layer is evicted whose turn is farthest away, if layers follow each other in a circle. Every path through the model
works; a layer that is skipped loads nothing. Walks over text go layer by layer besides (``replaceme.statistics.walk``).

transformers loads a layer as it loads a whole model: renamed, merged (experts that are stored one by one) and cast. So results
are the same bits. On the processor, in the dtype of the files, weights are mapped: they take the system's page cache, and no
memory of the process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from replaceme.base.errors import ModelError, ParameterError, excerpt

if TYPE_CHECKING:
    from replaceme.models.model_files import StoredTensor


class LazyParameter(nn.Parameter):
    """A parameter of a layer whose weights are not in memory: on the meta device, with shape and dtype.

    Attributes:
        read: loads the layer and returns the value, (…) in this dtype on the model's device.
    """

    read: Callable[[], Tensor]


def read_value(parameter: Tensor) -> Tensor:
    """Return a parameter's value without a gradient; that of a ``LazyParameter`` is loaded."""
    return parameter.read() if isinstance(parameter, LazyParameter) else parameter.detach()


class LayerLoader:
    """Has transformers load the tensors of one layer from the model's files, into a copy of the model without weights."""

    def __init__(self, model: Any, path: str, stored: Mapping[int, Mapping[str, StoredTensor]], device: torch.device):
        """Copy the model.

        Args:
            model: the model, with the parameters of its layers on the meta device, in the dtypes that are wanted.
            path: of its list of layers.
            stored: layer → name in the files → tensor.
            device: where the tensors are to be.
        """
        empty: dict[int, Any] = {id(each): nn.Parameter(each.to("meta"), requires_grad=False) for each in model.parameters()}
        self.copy = deepcopy(model, empty | {id(each): each.to("meta") for each in model.buffers()})
        self.layers = self.copy.get_submodule(path)
        self.rules = model._weight_conversions
        self.stored, self.device = stored, device

    @torch.inference_mode(False)  # What is made within inference mode can't be used outside of it.
    def read(self, index: int) -> dict[str, Tensor]:
        """Return a layer's parameters and stored buffers by name within the layer.

        Raises:
            ModelError: transformers can't convert them.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        tensors = {name: tensor.read(name) for name, tensor in self.stored[index].items()}
        # Each takes the dtype of its parameter in the copy.
        config = LoadStateDictConfig(device_map={"": self.device}, weight_mapping=self.rules)
        report, _ = convert_and_load_state_dict_in_model(self.copy, tensors, config)
        for name, failure in report.conversion_errors.items():
            raise ModelError(f"memory: {name} could not be read ({excerpt(failure, 150)}).")
        values = dict(self.layers[index].state_dict())
        self.layers[index].to("meta")
        return values


class LayerStream:
    """The layers of a streamed model.

    Attributes:
        layers: the layers, whose ``forward`` loads their weights.
        sizes: the bytes of each layer's weights.
        budget: the bytes that weights of layers may take.
        loaded: the layers whose weights are in memory.
        bytes_read: the bytes of weights that were read so far.
    """

    def __init__(self, layers: nn.ModuleList, loader: LayerLoader, budget: int, check: Callable[[Iterable[Tensor]], None]):
        """Take over the layers.

        Args:
            layers: the model's layers, whose parameters are on the meta device.
            loader: loads one of them.
            budget: the bytes that weights of layers may take.
            check: is called with a layer's values when they are read for the first time; it raises an error for unusable ones.
        """
        self.layers, self.loader, self.budget, self.check = layers, loader, budget, check
        self._load_buffers()
        self.lazy = [self._make_lazy(index) for index in range(len(layers))]
        self.sizes = [sum(each.numel() * each.itemsize for each in lazy.values()) for lazy in self.lazy]
        self.loaded, self.checked, self.pinned = set[int](), set[int](), Counter[int]()
        # Layer and name → the value that stands for the stored one.
        self.replacements: dict[tuple[int, str], nn.Parameter] = {}
        self.bytes_read = 0
        for index, layer in enumerate(layers):
            layer.forward = self._load_before(index, layer.forward)
            layer.__dict__["stream"] = self

    def load(self, index: int) -> None:
        """Have the weights of a layer in memory.

        Raises:
            ParameterError: they don't fit beside those of the layers that are in use.
        """
        if index in self.loaded:
            return
        self._make_room(index)
        values = self.loader.read(index)
        self.bytes_read += self.sizes[index]
        if index not in self.checked:
            self.check(values.values())
            self.checked.add(index)
        for name in self.lazy[index]:
            self._set(index, name, nn.Parameter(values[name], requires_grad=False))
        self.loaded.add(index)

    def evict(self, index: int) -> None:
        """Let the weights of a layer go; they are loaded again when its turn comes."""
        for name, lazy in self.lazy[index].items():
            self._set(index, name, lazy)
        self.loaded.discard(index)

    @contextmanager
    def pinning(self, indices: Sequence[int]) -> Iterator[None]:
        """Have the weights of some layers in memory inside the block; see ``layers_in_memory``."""
        self.pinned.update(indices)
        try:
            for index in indices:
                self.load(index)
            yield
        finally:
            self.pinned.subtract(indices)

    @contextmanager
    def replacing(self, index: int, name: str, value: Tensor) -> Iterator[None]:
        """Let a parameter of a layer have another value inside the block (``replaceme.models.layers``)."""
        made = value.to(self.loader.device, self.lazy[index][name].dtype, copy=True).contiguous()
        self.replacements[index, name] = nn.Parameter(made, requires_grad=False)
        self._set(index, name, self.lazy[index][name])
        try:
            yield
        finally:
            del self.replacements[index, name]
            # Its own value is in its file.
            self.evict(index)
            if self.pinned[index]:
                self.load(index)

    def index_of(self, layer: nn.Module) -> int:
        """Return the position of one of the layers in the whole model."""
        return next(index for index, each in enumerate(self.layers) if each is layer)

    def _load_buffers(self) -> None:
        """Load the buffers that are stored, few and small, to stay in memory."""
        for index, layer in enumerate(self.layers):
            if any(buffer.is_meta for buffer in layer.buffers()):
                values = self.loader.read(index)
                for name, buffer in [*layer.named_buffers()]:
                    if buffer.is_meta:
                        path, _, leaf = name.rpartition(".")
                        layer.get_submodule(path)._buffers[leaf] = values[name]

    def _make_lazy(self, index: int) -> dict[str, LazyParameter]:
        lazy = {}
        for name, parameter in self.layers[index].named_parameters():
            lazy[name] = LazyParameter(parameter, requires_grad=False)
            lazy[name].read = partial(self._read_value, index, name)
        for name, parameter in lazy.items():
            _set_parameter(self.layers[index], name, parameter)
        return lazy

    def _read_value(self, index: int, name: str) -> Tensor:
        self.load(index)
        return self.layers[index].get_parameter(name).detach()

    def _load_before(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def load_and_compute(*arguments: Any, **options: Any) -> Any:
            with self.pinning([index]):
                return forward(*arguments, **options)

        return load_and_compute

    def _make_room(self, index: int) -> None:
        """Evict layers until another one fits."""
        while sum(self.sizes[each] for each in self.loaded) + self.sizes[index] > self.budget:
            others = self.loaded - {*+self.pinned}
            if not others:
                raise ParameterError(
                    f"memory: {len(+self.pinned)} layers and more are needed at once here, and {self.budget / 1e9:.3g} GB are "
                    "left for layers; allow more, or null."
                )
            self.evict(max(others, key=lambda each: (each - index) % len(self.layers)))

    def _set(self, index: int, name: str, parameter: nn.Parameter) -> None:
        _set_parameter(self.layers[index], name, self.replacements.get((index, name), parameter))


def _set_parameter(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    layer.get_submodule(path)._parameters[leaf] = parameter


def stream_of(model: nn.Module) -> LayerStream | None:
    """Return the stream of a streamed model, or of one of its layers; None where the weights are all in memory."""
    return model.__dict__.get("stream")


def evict_layers(model: nn.Module, kept: Iterable[nn.Module] = ()) -> None:
    """Let the weights of a streamed model's layers go, but for some, before a computation that needs none of them."""
    if stream := stream_of(model):
        for index in stream.loaded - {*map(stream.index_of, kept), *+stream.pinned}:
            stream.evict(index)


@contextmanager
def layers_in_memory(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Have the weights of some layers in memory inside the block; those of a resident model always are.

    Raises:
        ParameterError: they take more than ``memory`` allows.
    """
    pinned = [*layers]
    stream = next(iter(map(stream_of, pinned)), None)
    with stream.pinning([*map(stream.index_of, pinned)]) if stream else nullcontext():
        yield
