"""SliceGPT (arXiv 2401.15024, section 3): project the residual stream onto its principal components, and compute only these.

The stream has 2 L + 1 signals, each read through an RMS norm alone: the inputs of the attention's norm and of the MLP's norm in
each layer, and of the last norm. Each signal has a basis Q (d, width): the eigenvectors of ``Σ hᵀh`` over real tokens with the
largest eigenvalues. The signals are taken in order, each computed from the sliced ones before it. (The published damping adds
the same to every eigenvalue; it changes no eigenvector, and is left out.) The model that projects its stream there,
``h ← h Q Qᵀ``, is computed with ``z = h Q``, width entries per token (torch's layout, y = x Wᵀ + b):

    embedding           E ← E Q                   linears that read the stream  W ← W diag(γ) Q,  γ ← 1
    linears that add    W ← Q'ᵀ W,  b ← Q'ᵀ b     shortcut                      z ← z QᵀQ'  (no shortcut where Q' = Q)

with Q' of the next signal, since ``‖h Q Qᵀ‖ = ‖z‖``. An RMS norm divides by the root mean square over d entries. Over width
entries it is the same for a z that is √(width / d) times as large. Hence everything added to the stream is multiplied by this
factor, the weights that read it are divided by it, and no epsilon changes.

With ``plain``, all signals of the dense model share one basis, and the result has the family's own class. There each token's
state is normalised to length 1, as a norm sees it: otherwise the large states of the last layers would dominate.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from replaceme.base.combinations import Use, Values
from replaceme.base.errors import ParameterError, SolveError
from replaceme.base.parameters import Params
from replaceme.base.progress import logger, progress
from replaceme.edits.model_edit import ModelEdit
from replaceme.methods.method import Method, MethodContext, leave_empty
from replaceme.selection.criteria import WIDTH

if TYPE_CHECKING:
    from torch import Tensor, nn

    from replaceme.base.documents import Batch
    from replaceme.models.families import Family
    from replaceme.models.layers import EntryState
    from replaceme.models.model import Model
    from replaceme.statistics.walk import Signal, Signals

# Tokens in one call of an MLP, and rows of a weight multiplied at once.
TOKENS, ROWS = 2048, 4096
# Widths are multiples of this, for fast matrix products.
MULTIPLE = 8
# The same in all families that have ``rms_norms``.
EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SHORTCUTS = ("attention_shortcut.weight", "mlp_shortcut.weight")


@dataclass(frozen=True)
class Slicing(ModelEdit):
    """A narrower residual stream.

    Attributes:
        bases: Q (d, width) float32 with orthonormal columns for each of the 2 L + 1 signals in order, or one for all.
    """

    kind = "slicing"
    reshapes = True
    bases: list[Tensor]

    def basis(self, signal: int) -> Tensor:
        """Return Q (d, width) of a signal: 2 l is the input of layer l, 2 l + 1 that of its MLP's norm, 2 L the last norm's."""
        return self.bases[signal if len(self.bases) > 1 else 0]

    @property
    def width(self) -> int:
        """Width of the narrower stream."""
        return self.bases[0].shape[1]

    @property
    def scale(self) -> float:
        """√(width / d), by which the narrower state is computed smaller: its mean square is then that of the whole state."""
        return math.sqrt(self.width / self.bases[0].shape[0])

    @contextmanager
    def unfused(self, model: nn.Module, family: Family) -> Iterator[None]:
        """Replace ``h`` by ``h Q Qᵀ`` at each signal: before each layer, before its MLP's norm, and after the last layer."""
        from replaceme.edits.unfused import operator_hook

        layers = family.decoder_layers(model)
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                hooks = _Projection(self.basis(2 * index), self.basis(2 * index + 1), family.multiplier)
                stack.callback(layer.register_forward_pre_hook(hooks.on_input, with_kwargs=True).remove)
                stack.callback(layer.get_submodule(family.attention).register_forward_hook(hooks.on_attention).remove)
            last = self.basis(2 * len(layers)).double()
            stack.callback(layers[-1].register_forward_hook(operator_hook(last @ last.T)).remove)
            yield

    def edited_parameters(
        self, model: nn.Module, family: Family, layers: nn.ModuleList
    ) -> Iterator[tuple[int | None, str, Tensor]]:
        """Yield each parameter of the narrower model that differs from the dense model's (``ModelEdit``)."""
        import torch

        from replaceme.base.accelerators import to_float64
        from replaceme.models.families import linears_within

        scale, ones = self.scale, torch.ones_like(self.basis(0)[0]).double()

        def basis(signal: int) -> Tensor:
            return self.basis(signal).double()

        def reads(module: nn.Module, name: str, norm: str, Q: Tensor) -> Tensor:
            return _product(module.get_parameter(name), to_float64(module.get_parameter(norm).detach())[:, None] * Q / scale)

        # The head comes before the embedding, whose weights it may share.
        yield None, HEAD, reads(model, HEAD, LAST_NORM, basis(2 * len(layers)))
        yield None, LAST_NORM, ones
        yield None, EMBEDDING, _product(model.get_parameter(EMBEDDING), basis(0) * scale)
        ends = (family.attention, family.attention_output), (family.mlp, family.mlp_output)
        for index, layer in enumerate(layers):
            for part, (parent, end) in enumerate(ends):
                Q, next_Q = basis(2 * index + part), basis(2 * index + part + 1)
                norm = f"{family.rms_norms[part]}.weight"
                for path in linears_within(layer.get_submodule(parent)):
                    if f"{parent}.{path}" != end:
                        name = f"{parent}.{path}.weight"
                        yield index, name, reads(layer, name, norm, Q)
                yield index, norm, ones
                for kind, parameter in layer.get_submodule(end).named_parameters():
                    yield index, f"{end}.{kind}", (next_Q * scale).T @ to_float64(parameter.detach())
                if len(self.bases) > 1:
                    yield index, SHORTCUTS[part], Q.T @ next_Q

    def own_form(self, layers: str, position: Callable[[int], int]) -> dict[str, Any]:
        """Return the shortcuts, which no family has; one basis for all signals needs none."""
        return {"shortcuts": True, "width": self.width} if len(self.bases) > 1 else {}

    def as_dense(self, layer: int, state: Tensor) -> Tensor:
        """Convert the narrower state after a layer, (tokens, width), to (tokens, d)."""
        from replaceme.base.accelerators import to_float64

        exact = to_float64(state)
        return exact @ self.basis(2 * (layer + 1)).T.to(exact) / self.scale

    def as_pruned(self, layer: int, state: Tensor) -> Tensor:
        """Convert the state before a layer, (tokens, d), to the narrower one, (tokens, width)."""
        from replaceme.base.accelerators import to_float64

        exact = to_float64(state)
        return exact @ self.basis(2 * layer).to(exact) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        """Return ``basis.<signal>``, (d, width) float32 each."""
        return {f"basis.{signal}": Q for signal, Q in enumerate(self.bases)}

    @classmethod
    def from_stored(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Read what ``tensors`` returned."""
        return cls([tensors[f"basis.{signal}"] for signal in range(sum(name.startswith("basis.") for name in tensors))])


def sliced_config(config: Any, slicing: Slicing) -> dict[str, Any]:
    """Return the config's entries of the narrower model; its ``hidden_size`` only where the family's own class loads it."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = {"hidden_size": slicing.width} if len(slicing.bases) == 1 else {}
    return {"head_dim": head_dim, "tie_word_embeddings": False, **width}


def _product(weight: nn.Parameter, right: Tensor) -> Tensor:
    """Return ``W right`` in float64, some rows at a time: a whole embedding in float64 can be larger than a small model."""
    import torch

    from replaceme.base.accelerators import to_float64

    return torch.cat([to_float64(rows) @ right for rows in weight.detach().split(ROWS)])


class _Projection:
    """Hooks that project a layer's input by Q, and the sum of that and its attention's output by ``next_Q``."""

    def __init__(self, Q: Tensor, next_Q: Tensor, multiplier: float):
        self.Q, self.next_Q, self.multiplier = Q, next_Q, multiplier

    def on_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from replaceme.models.layers import input_of, replace_input

        entering = input_of(args, kwargs)
        self.state = project(entering, self.Q).to(entering.dtype)
        return replace_input(args, kwargs, self.state)

    def on_attention(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        import torch

        from replaceme.models.layers import replace_output, tensor_of

        added = tensor_of(output)
        dtype = torch.promote_types(added.dtype, torch.float32)
        state = self.state.to(dtype)
        projected = project(state + self.multiplier * added.to(dtype), self.next_Q)
        return replace_output(output, ((projected - state) / self.multiplier).to(added.dtype))


def project(state: Tensor, Q: Tensor) -> Tensor:
    """Return ``h Q Qᵀ`` (…, d), in float32 or the state's wider dtype."""
    import torch

    dtype = torch.promote_types(state.dtype, torch.float32)
    Q = Q.to(state.device, dtype)
    return state.to(dtype) @ Q @ Q.T


def slice_stream(context: MethodContext) -> dict[str, Any]:
    """Add the slicing to the edits, and return its figures."""
    params, edits, config, d = context.params, context.edits, context.model.config, context.width
    width, parameters, dense = fitting_width(context.model, context.family, params.layers_to_skip, params.plain)
    bases = (find_shared_basis if params.plain else find_bases)(context, width)
    edits.model_edit = slicing = Slicing([Q.cpu() for Q, _ in bases])
    edits.config = sliced_config(config, slicing)
    edits.parts = f"{d - width} of the {d} dimensions of its residual stream"
    kept = [fraction for _, fraction in bases]
    figures = {
        "width": width,
        "slicing": 1 - width / d,
        "parameters": parameters,
        "parameters_removed": dense - parameters,
        "kept_squares_lowest": min(kept),
        "kept_squares_mean": sum(kept) / len(kept),
    }
    logger.info(
        "repair: width %d of %d (%.1f %% sliced), %.1f M of %.1f M parameters; of the states' squares, %.4f are kept at least",
        width, d, 100 * figures["slicing"], parameters / 1e6, dense / 1e6, figures["kept_squares_lowest"],
    )  # fmt: skip
    return figures


def find_bases(context: MethodContext, width: int) -> list[tuple[Tensor, float]]:
    """Return Q and the fraction of the trace that it keeps for each signal; each is computed from the sliced ones before it.

    The tokens' states, in a file on disk, are projected and go through one attention or one MLP at a time, so that every layer
    is computed once.
    """
    import torch

    from replaceme.base.scratch import scratch
    from replaceme.models.devices import require_resident
    from replaceme.models.layers import EntryState

    family, layers = context.family, context.layers
    require_resident(dict(enumerate(layers)), "whose MLP is computed by itself")
    (states,) = scratch([(context.documents.token_count, context.width)], context.model.dtype, context.folder, "slicing")
    bases: list[tuple[Tensor, float]] = []
    with torch.inference_mode():
        gram = _walk_layer(context, 0, ("input",), states, None)
        for index, layer in enumerate(progress(layers, "slicing layers", "layers")):
            bases.append(principal(gram, width))
            for rows in states.split(TOKENS):
                Q = bases[-1][0]
                rows.copy_(project(rows.to(Q.device), Q))
            gram = _walk_layer(context, index, ("input", "attention"), states, EntryState(index, states))
            bases.append(principal(gram, width))
            gram = _pass_mlp(layer, family, states, bases[-1][0])
        bases.append(principal(gram, width))
    return bases


def find_shared_basis(context: MethodContext, width: int) -> list[tuple[Tensor, float]]:
    """Return one Q for all signals of the dense model, and the fraction of their common trace that it keeps."""
    from replaceme.statistics.walk import walk

    pool = _PooledStates(len(context.layers), context.width)
    walk(context, [pool], description="watching all states")
    return [principal(pool.gram, width)]


def principal(gram: Tensor, width: int) -> tuple[Tensor, float]:
    """Return the ``width`` leading eigenvectors of ``Σ hᵀh`` (d, d), (d, width) float32, and their part of its trace.

    They are computed on the device of the sums, of which the half above the diagonal is read, and stay there.

    Raises:
        SolveError: the sums are not finite.
    """
    import torch

    from replaceme.statistics.sums import mirror

    gram = mirror(gram.clone())
    if not bool(torch.isfinite(gram).all()):
        raise SolveError("dtype: the sums over the states are not finite; use float32 or bfloat16.")
    eigenvalues, vectors = torch.linalg.eigh(gram)
    fraction = eigenvalues[-width:].sum() / eigenvalues.sum()
    return vectors[:, -width:].flip(1).float().contiguous(), float(fraction)


def _walk_layer(
    context: MethodContext, layer: int, signals: tuple[Signal, ...], states: Tensor, start: EntryState | None
) -> Tensor:
    """Overwrite all tokens' states with the sum of a layer's signals, and return its ``Σ hᵀh`` (d, d) float64."""
    from replaceme.statistics.walk import walk

    recorded = _RecordedStates(layer, signals, states)
    walk(context, [recorded], description=None, start=start)
    return recorded.gram


def _pass_mlp(layer: Any, family: Family, states: Tensor, Q: Tensor) -> Tensor:
    """Project all tokens' states, update them by a layer's MLP, in place, and return ``Σ hᵀh`` (d, d) float64."""
    import torch

    from replaceme.base.accelerators import float64_device
    from replaceme.statistics.sums import add_squares

    norm, mlp = layer.get_submodule(family.rms_norms[1]), layer.get_submodule(family.mlp)
    device = next(mlp.parameters()).device
    gram = torch.zeros(len(Q), len(Q), dtype=torch.float64, device=float64_device(device))
    for rows in states.split(TOKENS):
        state = project(rows.to(device), Q)
        added = mlp(norm(state.to(rows.dtype)[None]))[0]
        state = state + family.multiplier * added.to(state)
        add_squares(gram, state)
        rows.copy_(state)
    return gram


class _RecordedStates:
    """Observer that stores the sum h of some signals of a layer, (tokens, d), and ``gram`` = Σ hᵀh."""

    def __init__(self, layer: int, summands: tuple[Signal, ...], states: Tensor):
        self.layer, self.summands, self.states, self.gram = layer, summands, states, _zeros(states.shape[1])

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return {self.layer: frozenset(self.summands)}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        from replaceme.base.accelerators import float64_device
        from replaceme.statistics.sums import add_squares

        state = _sum_of(signals, self.summands, batch)
        self.gram = add_squares(self.gram.to(float64_device(state.device)), state)
        self.states[batch.tokens] = state.to(self.states)


class _PooledStates:
    """Observer of all signals h of a model: ``gram`` = Σ hᵀh / ‖h‖² over tokens and signals."""

    def __init__(self, layers: int, d: int):
        self.layers, self.gram = layers, _zeros(d)

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        of_each: frozenset[Signal] = frozenset({"input", "attention"})
        return {**dict.fromkeys(range(self.layers), of_each), self.layers - 1: of_each | {"output"}}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        from replaceme.base.accelerators import float64_device
        from replaceme.statistics.sums import add_squares, token_weights

        states = [_sum_of(signals, names, batch) for names in (("input",), ("input", "attention"))]
        if "output" in signals:
            states.append(_sum_of(signals, ("output",), batch))
        for state in states:
            self.gram = add_squares(self.gram.to(float64_device(state.device)), state * token_weights(state).sqrt())


def _zeros(d: int) -> Tensor:
    import torch

    return torch.zeros(d, d, dtype=torch.float64)


def _sum_of(signals: Signals, names: Sequence[Any], batch: Batch) -> Tensor:
    """Return the sum of signals over real tokens: (tokens, d), float32 or wider."""
    import torch

    states = [batch.real(signals[name]) for name in names]
    return torch.stack(states).to(torch.promote_types(states[0].dtype, torch.float32)).sum(dim=0)


def fitting_width(model: Any, family: Family, layers: int, one_basis: bool) -> tuple[int, int, int]:
    """Return the width whose model is closest in size to the dense one without ``layers`` average layers; and both sizes.

    All parameters count, also those of an untied head and of the shortcuts.

    Args:
        model: the dense model; its weights need not be loaded.
        family: its description.
        layers: the number of layers whose parameters the slicing removes.
        one_basis: whether all signals share one basis; then there are no shortcuts, and the width is also a multiple of the
            number of heads, as the families' own classes require.

    Raises:
        ParameterError: no narrower width exists.
    """
    import torch

    from replaceme.models.model import parameter_count

    with torch.device("meta"):
        skeleton = type(model)(model.config)
    d, heads = int(model.config.hidden_size), int(model.config.num_attention_heads)
    multiple = math.lcm(MULTIPLE, heads) if one_basis else MULTIPLE
    widths = range(multiple, d, multiple)
    if not widths:
        raise ParameterError(
            f"plain: the width would be a multiple of {multiple}, for {heads} attention heads, and the model's is {d}; "
            "use false."
        )
    blocks = family.decoder_layers(skeleton)
    total, of_layers = map(parameter_count, (skeleton, blocks))
    target = total - layers * of_layers / len(blocks)
    count = len(blocks) * 2 + 1

    def size(width: int) -> int:
        slicing = Slicing([torch.empty(d, width, device="meta")] * (1 if one_basis else count))
        sizes = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
        for layer, name, exact in slicing.edited_parameters(skeleton, family, blocks):
            sizes[name if layer is None else f"{family.layers}.{layer}.{name}"] = exact.numel()
        return sum(sizes.values())

    width = find_nearest(widths, target, size)
    return width, size(width), total


def find_nearest(widths: Sequence[int], target: float, size: Callable[[int], int]) -> int:
    """Return the width whose size is nearest to the target; sizes grow with the width."""
    above = bisect_left(widths, target, key=size)
    return min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(size(width) - target))


def check(params: Params, model: Model, family: Family) -> None:
    """Refuse families whose residual stream can't be narrowed exactly, and models that no width suits."""
    from replaceme.models.own_form import check_own_form

    config = model.config()
    if family.slicing_obstacle:
        raise ParameterError(
            f"method: slicegpt is refused for the family '{config.model_type}': {family.slicing_obstacle}; use another method."
        )
    if not params.plain:
        check_own_form(config)
    fitting_width(model.skeleton(config), family, params.layers_to_skip, params.plain)


def refuses(values: Values) -> list[str]:
    """Refuse layer limits, which would be ignored."""
    return [
        f"{key}: method slicegpt slices all layers alike; use null."
        for key in ("min_distance_layer", "max_distance_layer")
        if values[key] is not None
    ]


METHOD = Method(
    common={"plain": Use(("repair",))},
    solve=leave_empty("SliceGPT"),
    criterion=WIDTH,
    fit_on_model=slice_stream,
    words="removes parts of layers, not whole layers",
    selections=(),
    several=False,
    repairs=False,
    refuses=refuses,
    check=check,
)
