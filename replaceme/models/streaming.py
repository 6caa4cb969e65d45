"""Stream a model whose layers don't fit in memory: each layer's weights are read from their files when its turn comes.

transformers builds the model on the meta device and loads what is outside the decoder layers as ever: embeddings, the last
norm, the head, buffers. The layers' parameters stay ``Unread``. A layer's ``forward`` first brings its weights from the
safetensors, and a thread reads the next layer's while it computes. As many layers as fit into the room stay; of these, the one
whose turn is farthest away is let go, if layers follow each other in a circle. Every path through the model works; a layer that
is passed by reads nothing. Walks over text go layer by layer besides, so that they read each layer once
(``replaceme.observers.walk``).

Weights are cast and converted as transformers does it (experts that are stored one by one), so that results are the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn

from replaceme.base.errors import ParameterError

Values = dict[str, Tensor]
# Bytes: of a cache line, and of the widest vectors.
ALIGNMENT = 64


class InFile(Protocol):
    """A tensor in a file."""

    def read(self, name: str) -> Tensor:
        """Return it, given its name in the file."""
        ...


class Unread(nn.Parameter):
    """A parameter of a streamed layer while its weights are not in memory: on the meta device, with shape and dtype.

    Attributes:
        read: reads its value from the file, (…) in its dtype on the model's device, and keeps nothing in memory.
    """

    read: Callable[[], Tensor]


def value_of(parameter: Tensor) -> Tensor:
    """Return a parameter's value without a gradient; that of an ``Unread`` one is read from its file."""
    return parameter.read() if isinstance(parameter, Unread) else parameter.detach()


@dataclass
class Group:
    """Tensors in files that make up parameters: one and one, or several by a conversion of transformers.

    Attributes:
        first: the first of the parameters.
        converter: the conversion; None takes the tensor as it is.
        names, patterns, shapes: of the tensors in order: name in the files, what the conversion knows it by, and shape.
        dtype: of the parameters.
    """

    first: str
    converter: Any
    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    shapes: list[Sequence[int]] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def read(self, model: Any, stored: Mapping[str, InFile], device: torch.device) -> Values:
        """Return the parameters by name. Reads nothing else, and leaves no mapping of a file."""
        return self._made(model, [_copied(stored[own].read(own), device, self.dtype) for own in self.names])

    def empty(self, model: Any) -> Values:
        """Return the parameters by name, on the meta device."""
        return self._made(model, [torch.empty(shape, dtype=self.dtype, device="meta") for shape in self.shapes])

    def _made(self, model: Any, parts: Sequence[Tensor]) -> Values:
        if self.converter is None:
            return {self.first: parts[0]}
        conversion = deepcopy(self.converter)
        for own, pattern, part in zip(self.names, self.patterns, parts, strict=True):
            conversion.add_tensor(self.first, own, pattern, part)
        made = conversion.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _copied(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a copy of a tensor that is mapped from a file.

    Where nothing is cast or moved, a resident model computes with the mapping itself. The last bits of some products depend on
    how their operands lie in memory, so the copy lies as the mapping does.
    """
    if (tensor.device, tensor.dtype) != (device, dtype) or tensor.data_ptr() % tensor.itemsize:
        return tensor.to(device, dtype, copy=True)
    size = tensor.numel() * tensor.itemsize
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = (tensor.data_ptr() - memory.data_ptr()) % ALIGNMENT
    return memory[start : start + size].view(dtype).view(tensor.shape).copy_(tensor)


@contextmanager
def layers_left_out(prefix: str) -> Iterator[list[Group]]:
    """Let transformers load a model inside the block without the parameters of its layers, which stay on the meta device.

    Args:
        prefix: what their names begin with.

    Yields:
        Their places in the files, filled while the model is loaded.
    """
    from transformers import core_model_loading, modeling_utils

    groups: list[Group] = []
    load = modeling_utils.convert_and_load_state_dict_in_model

    def loading(model: Any, state_dict: dict[str, Any], load_config: Any, *rest: Any, **options: Any) -> Any:
        rules = load_config.weight_mapping or []
        converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
        renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        held, parameters = model.state_dict(), dict(model.named_parameters())
        found: dict[str, Group] = {}
        for own in sorted(state_dict, key=core_model_loading.dot_natural_key):
            name, pattern = core_model_loading.rename_source_key(own, renamings, converters, model.base_model_prefix, held)
            if name not in held and own in held:
                name, pattern = own, None
            if name.startswith(prefix) and name in parameters:
                group = found.setdefault(name, Group(name, by_pattern[pattern] if pattern else None))
                group.names.append(own)
                group.patterns.append(pattern or own)
                group.shapes.append(state_dict[own].get_shape())
                state_dict[own] = _Left(group.shapes[-1])
        result = load(model, state_dict, load_config, *rest, **options)
        for group in found.values():
            group.dtype = model.get_parameter(group.first).dtype
        groups.extend(found.values())
        return result

    with mock.patch.object(modeling_utils, "convert_and_load_state_dict_in_model", loading):
        yield groups


class _Left:
    """A tensor in a file, for transformers' loading: it becomes an empty one on the meta device."""

    def __init__(self, shape: Sequence[int]):
        self.shape = shape

    def __getitem__(self, _: Any) -> _Left:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device="meta")


class Stream:
    """The layers of a streamed model.

    Attributes:
        layers: the layers, whose ``forward`` reads their weights.
        folder: where walks may put scratch files; None is the system's temporary folder.
        sizes: the bytes of each layer's weights.
        bytes_read: the bytes of weights that were read so far.
    """

    def __init__(
        self,
        model: Any,
        layers: nn.ModuleList,
        groups: Iterable[Group],
        stored: Mapping[str, InFile],
        *,
        prefix: str,
        room: int,
        device: torch.device,
        check: Callable[[Values], None] = lambda values: None,
        folder: Path | None = None,
    ):
        """Take over the layers.

        Args:
            model: the model, whose layers' parameters are on the meta device.
            layers: its layers.
            groups: the places of their parameters.
            stored: the tensors in the files.
            prefix: what the names of the layers' parameters begin with: this, a number, and a dot.
            room: the bytes that weights of layers may take.
            device: where they are computed with.
            check: is called with the values that are read for the first time; it raises an error for unusable ones.
            folder: for the scratch files of walks.
        """
        self.model, self.layers, self.stored, self.prefix, self.room = model, layers, stored, prefix, room
        self.device, self.check, self.folder = device, check, folder
        self.bytes_read = 0
        self.groups: list[list[Group]] = [[] for _ in layers]
        for group in groups:
            self.groups[int(group.first.removeprefix(prefix).split(".")[0])].append(group)
        self.unread: list[dict[str, Unread]] = [{} for _ in layers]
        for index in range(len(layers)):
            for group in self.groups[index]:
                self._leave(index, group)
        self.sizes = [sum(each.numel() * each.itemsize for each in unread.values()) for unread in self.unread]
        self.here: set[int] = set()
        self.checked: set[int] = set()
        self.pinned: Counter[int] = Counter()
        # Names of parameters that have another value at present, which stays.
        self.kept: set[str] = set()
        self.ahead: tuple[int, Future[Values]] | None = None
        self.pool = ThreadPoolExecutor(1, "weights")
        self.computing = [self._first_brought(index) for index in range(len(layers))]
        for layer, forward in zip(layers, self.computing, strict=True):
            layer.forward = forward
            layer.__dict__["stream"] = self

    def turn(self, index: int) -> None:
        """Wait until a layer may be computed, where computations share the model (``replaceme.models.interleaving``)."""

    @contextmanager
    def loaded(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Keep the weights of some layers in memory inside the block.

        Raises:
            ParameterError: they take more than the room.
        """
        wanted = [self.index_of(layer) for layer in layers]
        self.pinned.update(wanted)
        try:
            for index in wanted:
                self._bring(index)
            yield
        finally:
            self.pinned.subtract(wanted)

    @contextmanager
    def replaced(self, layer: nn.Module, name: str, value: Tensor) -> Iterator[None]:
        """Let a parameter of a layer have another value, of any shape, inside the block."""
        index = self.index_of(layer)
        whole = f"{self.prefix}{index}.{name}"
        unread = self.unread[index][whole]
        self.kept.add(whole)
        made = value.to(self.device, unread.dtype, copy=True).contiguous()
        self._set(index, whole, nn.Parameter(made, requires_grad=False))
        try:
            yield
        finally:
            self.kept.discard(whole)
            own = nn.Parameter(unread.read(), requires_grad=False) if index in self.here else unread
            self._set(index, whole, own)

    def free(self, kept: Iterable[nn.Module] = ()) -> None:
        """Let the weights of all layers go, but for some; they come again when their turn does."""
        staying = {self.index_of(layer) for layer in kept} | {index for index, count in self.pinned.items() if count > 0}
        if self.ahead is not None and self.ahead[0] not in staying:
            self._forget_ahead()
        for index in self.here - staying:
            self._let_go(index)

    def index_of(self, layer: nn.Module) -> int:
        """Return the position of one of the layers in the whole model."""
        return next(index for index, each in enumerate(self.layers) if each is layer)

    def _leave(self, index: int, group: Group) -> None:
        """Make the parameters of a group ``Unread``."""
        for name, empty in group.empty(self.model).items():
            unread = Unread(empty, requires_grad=False)
            unread.read = partial(self._value, group, name)
            self.unread[index][name] = unread
            self._set(index, name, unread)

    def _first_brought(self, index: int) -> Callable[..., Any]:
        forward = self.layers[index].forward

        @wraps(forward)
        def computing(*arguments: Any, **options: Any) -> Any:
            self.turn(index)
            self._bring(index)
            self._read_ahead(index)
            return forward(*arguments, **options)

        return computing

    def _bring(self, index: int) -> None:
        """Have the weights of a layer in memory."""
        if index in self.here:
            return
        if self.ahead is None or self.ahead[0] != index:
            self._forget_ahead()
            if not self._make_room(index, index):
                raise ParameterError(
                    f"memory: {sum(count > 0 for count in self.pinned.values())} layers and more are needed at once here, and "
                    f"{self.room / 1e9:.3g} GB are left for layers; allow more, or null."
                )
            # In the thread too: what is read within inference mode can't be used outside of it.
            self.ahead = index, self.pool.submit(self._read, index)
        (_, reading), self.ahead = self.ahead, None
        for name, value in reading.result().items():
            if name not in self.kept:
                self._set(index, name, nn.Parameter(value, requires_grad=False))
        self.here.add(index)

    def _read_ahead(self, index: int) -> None:
        """Begin to read the next layer that computes, if there is room for it beside this one."""
        following = (
            next_ for next_ in range(index + 1, len(self.layers)) if self.layers[next_].forward is self.computing[next_]
        )
        wanted = next(following, None)
        if wanted is None or wanted in self.here or self.ahead is not None:
            return
        if self._make_room(wanted, index):
            self.ahead = wanted, self.pool.submit(self._read, wanted)

    def _forget_ahead(self) -> None:
        if self.ahead is not None and not self.ahead[1].cancel():
            # Its memory is free only when it is done.
            wait([self.ahead[1]])
        self.ahead = None

    def _make_room(self, index: int, computing: int) -> bool:
        """Let layers go until another one fits; return whether it does."""
        while sum(self.sizes[each] for each in self.here) + self.sizes[index] > self.room:
            free = [each for each in self.here if each != computing and not self.pinned[each]]
            if not free:
                return False
            self._let_go(max(free, key=lambda each: (each - computing) % len(self.layers)))
        return True

    def _let_go(self, index: int) -> None:
        for name, unread in self.unread[index].items():
            if name not in self.kept:
                self._set(index, name, unread)
        self.here.discard(index)

    def _read(self, index: int) -> Values:
        values: Values = {}
        for group in self.groups[index]:
            values |= group.read(self.model, self.stored, self.device)
        self.bytes_read += self.sizes[index]
        if index not in self.checked:
            self.check(values)
            self.checked.add(index)
        return values

    def _value(self, group: Group, name: str) -> Tensor:
        value = self.pool.submit(group.read, self.model, self.stored, self.device).result()[name]
        self.bytes_read += value.numel() * value.itemsize
        return value

    def _set(self, index: int, name: str, parameter: nn.Parameter) -> None:
        # Within the layer, whose place in the model can have changed.
        path, _, leaf = name.removeprefix(f"{self.prefix}{index}.").rpartition(".")
        self.layers[index].get_submodule(path)._parameters[leaf] = parameter


def stream_of(model: nn.Module) -> Stream | None:
    """Return the stream of a streamed model; None for one whose weights are all in memory."""
    return model.__dict__.get("stream")


def free(model: nn.Module, kept: Iterable[nn.Module] = ()) -> None:
    """Let the weights of a streamed model's layers go, but for some, before a computation that needs none of them."""
    if stream := stream_of(model):
        stream.free(kept)


@contextmanager
def loaded(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Have the weights of some layers in memory inside the block; those of a resident model always are.

    Raises:
        ParameterError: they take more than ``memory`` allows.
    """
    wanted = [*layers]
    with ExitStack() as stack:
        for stream in {stream for layer in wanted if (stream := layer.__dict__.get("stream"))}:
            stack.enter_context(stream.loaded(wanted))
        yield


@contextmanager
def replaced(layer: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Let a parameter of a layer have another value inside the block, in its own dtype and on its device; any shape will do."""
    parameter, stream = layer.get_parameter(name), layer.__dict__.get("stream")
    if stream is not None:
        with stream.replaced(layer, name, value):
            yield
        return
    own = parameter.data
    parameter.data = value.to(own, copy=True).contiguous()
    try:
        yield
    finally:
        parameter.data = own
