"""Temporary changes to a loaded model: skip layers, start at a later one, silence an attention, choose which parameters get
gradients.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from replaceme.base.accelerators import to_device
from replaceme.base.documents import Batch
from replaceme.models.families import Family, in_torch_layout, is_conv1d
from replaceme.models.streaming import stream_of


@dataclass(frozen=True)
class EntryState:
    """The state with which a walk enters a later layer than the first.

    Attributes:
        layer: the layer.
        states: its input, (tokens, d): the real tokens in the order of the walk; None takes it from the batch (``carried``).
        attention: input of its attention's last linear, (tokens, inputs) in the same order; None computes it.
    """

    layer: int
    states: Tensor | None
    attention: Tensor | None = None

    def of_batch(self, batch: Batch) -> Tensor:
        """Return the layer's input, (documents, longest, d)."""
        if self.states is None:
            return batch.scratch["carried"]
        return batch.padded(to_device(self.states[batch.tokens], batch.input_ids.device))


def tensor_of(output: Any) -> Tensor:
    """Return the hidden states of a module's output, which some families wrap in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def replace_output(output: Any, states: Tensor) -> Any:
    """Return a module's output with other hidden states."""
    return states if isinstance(output, Tensor) else (states, *output[1:])


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states in the arguments of a layer or an attention: the first one, or one by name."""
    return args[0] if args else kwargs["hidden_states"]


def replace_input(args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer or an attention with other hidden states."""
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})


@contextmanager
def enable_gradients(model: nn.Module, parameters: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Enable gradients for exactly these parameters of a model inside the block, and restore the flags after it."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else inside the block."""
    # A streamed layer, or one that accelerate placed, has a ``forward`` of its own already.
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def replacing_parameter(layer: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Let a parameter of a layer have another value inside the block, in its own dtype and on its device.

    The value is given in torch's layout. It may have another shape.
    """
    owner: Any = layer.get_submodule(name.rpartition(".")[0])
    parameter, made = layer.get_parameter(name), in_torch_layout(layer, name, value)
    with ExitStack() as stack:
        if stream := stream_of(layer):
            stack.enter_context(stream.replacing(stream.index_of(layer), name, made))
        else:
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = made.to(parameter, copy=True).contiguous()
        # Conv1D is the only linear whose forward uses its number of outputs.
        if is_conv1d(owner):
            stack.callback(setattr, owner, "nf", owner.nf)
            owner.nf = made.shape[-1]
        yield


@contextmanager
def silence_attention(attention: nn.Module) -> Iterator[None]:
    """Let an attention compute nothing and return zeros inside the block."""
    from replaceme.models.modeling_pruned import NoAttention

    with replace_forward(attention, NoAttention(None).forward):
        yield


@contextmanager
def skip_layers(family: Family, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Skip layers inside the block: each returns its input and computes nothing."""

    def pass_on(hidden_states: Tensor, *_arguments: Any, **_options: Any) -> Any:
        return (hidden_states, None) if family.returns_tuple else hidden_states

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replace_forward(layer, pass_on))
        yield


@contextmanager
def start_at_layer(
    family: Family, layers: nn.ModuleList, entry: EntryState, current: Callable[[], Batch | None]
) -> Iterator[None]:
    """Start a model's forward passes at a later layer inside the block; the layers before it compute nothing.

    Args:
        family: its description. If ``entry.attention`` is given, the family has no norm after the attention's last linear.
        layers: the model's layers.
        entry: the layer and its input.
        current: returns the batch that is being computed.
    """
    layer = layers[entry.layer]

    def batch() -> Batch:
        now = current()
        assert now is not None
        return now

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_input(args, kwargs, entry.of_batch(batch()))

    def attend(*arguments: Any, **options: Any) -> tuple[Tensor, None]:
        assert entry.attention is not None
        now = batch()
        features = now.padded(to_device(entry.attention[now.tokens], input_of(arguments, options).device))
        return family.linear_of(layer, "attention_output")(features), None

    with ExitStack() as stack:
        stack.enter_context(skip_layers(family, layers[: entry.layer]))
        stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if entry.attention is not None:
            stack.enter_context(replace_forward(layer.get_submodule(family.attention), attend))
        yield
