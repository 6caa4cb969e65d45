"""``Edits``: a method's decisions as data. Export applies them without knowing the method.

Two changes to linears whose output is added to the residual stream (torch layout, ``y = G Wᵀ + b``):

- a transform ``y T``: ``W' = TᵀW`` and ``b' = Tᵀb`` (ReplaceMe, section 3). Where a norm follows the MLP, T acts on the norm's
  output before its weight, so that it doesn't depend on how that weight is rounded;
- a correction added to it, ``y T + G Δᵀ + δ``: ``W' = TᵀW + Δ`` and ``b' = Tᵀb + δ``. Where a norm follows, Q replaces T
  (``W' = QᵀW + Δ``).

Changes to whole layers:

- a mixture replaces all linears of a layer, applied before the two changes above: ``W = Σ c_j W_j`` and ``b = Σ c_j b_j`` over
  itself and removed layers (LaCo, arXiv 2402.11187). The layer keeps its norms;
- an MLP can be made of other channels, some from removed layers, applied before the two changes above. It keeps its width
  (``replaceme.edits.channels``);
- an operator P multiplies the state after a layer, ``h P`` (LinearPatch, arXiv 2505.24680; Ghosted, arXiv 2605.15491;
  Prune&Comp, arXiv 2507.18212). A scalar folds, since norms ignore scale: everything that later layers add is divided by it.
  Any other P stays an operator, and the model is saved with ``replaceme.models.modeling_pruned``;
- trained parameters replace a layer's own;
- a layer can lose its attention and the norm before it: it becomes ``h + MLP(norm(h))``;
- parts of a layer can be removed (LLM-Pruner, arXiv 2305.11627): its attention and its MLP consist of groups, whose
  contributions to the last linear's output add up. A removed group takes with it its columns of the last linear and the rows of
  the linears before that compute its features.

One change to the whole model: a narrower residual stream (SliceGPT, arXiv 2401.15024). At each signal (the input of an
attention's norm, an MLP's norm or the last norm) ``h`` becomes ``h Q Qᵀ``, and only ``h Q`` is computed
(``replaceme.edits.slicing``).

On disk: ``edits.json`` (title, layers, mixtures, shapes, and the keys of the tensors) and ``edits.safetensors``
(``transform.<layer>``, d × d float64; ``correction.<layer>.<linear>.weight``, d × inputs float32, and ``….bias``, d;
``channels.<layer>``, f × 2 int64; ``operator.<layer>``, a scalar, vector or matrix, float64; ``parameter.<layer>.<name>``;
``basis.<signal>``, d × width float32; ``kept.<layer>.<linear>``, a bool for each group).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.base.errors import SolveError
from replaceme.base.files import read_json, write_json

if TYPE_CHECKING:
    from replaceme.models.families import Linear

# Largest entry of QᵀQ − I that rounding explains.
ORTHOGONAL = 1e-6


@dataclass(frozen=True)
class Change:
    """How one linear's output changes: ``y T + G Δᵀ + δ``; where a norm follows, Q replaces T (``rotation_and_gains``).

    Attributes:
        transform: T (d, d), or None for the identity.
        weight: Δ (d, inputs), or None for 0.
        bias: δ (d,), or None for 0; only where the linear has a bias.
    """

    transform: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def rotation_and_gains(transform: Tensor) -> tuple[Tensor, Tensor]:
    """Split a transform ``Q D`` of a norm's output before its weight: Q orthogonal (d, d), and the diagonal of D (d,).

    Raises:
        SolveError: the transform is no such product.
    """
    gains = transform.double().norm(dim=0)
    rotation = transform.double() / gains
    identity = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    # In this form NaN fails too: a column of zeros gives it.
    if not float((rotation.T @ rotation - identity).abs().max()) <= ORTHOGONAL:
        raise SolveError("transform: this map does not fold into the norm after the MLP; use transform: orthogonal.")
    return rotation, gains


def features_of(groups: Tensor, features: int) -> Tensor:
    """Return which features stay, (features,) bool; ``groups`` (groups,) bool divide them into equal parts, in order."""
    return groups.repeat_interleave(features // len(groups))


@dataclass
class Edits:
    """Changes to a model. All layer indices are those of the dense model.

    Attributes:
        title: the method's name, for the model card.
        removed_layers: removed layers.
        parts: removed parts of kept layers, in words that follow "without" (``3 of 9 heads in every layer``); else empty.
        transforms: layer → T (d, d) float64, for the last linear of the layer's MLP.
        corrections: (layer, linear) → Δ (d, inputs) and δ (d,) or None; float32.
        mixtures: kept layer → coefficients of the original layers whose linears it mixes, itself included.
        channels: kept layer → its MLP's channels, (f, 2) int64: for each an original layer (itself or a removed one) and the
            index there.
        operators: kept layer → P of the state after it: a scalar (), a diagonal (d,) or any map (d, d), float64.
        parameters: (kept layer, name within it) → the parameter's new value, in torch's layout.
        without_attention: kept layer → paths within it of the removed attention and of the removed norm before it.
        bases: Q (d, width) float32 with orthonormal columns for each of the 2 L + 1 signals in order, or one for all; empty
            where the stream keeps its width. With bases there are no other changes.
        kept: (kept layer, linear) → which groups of the linear's inputs stay, (groups,) bool. The groups divide these inputs,
            and the outputs of the linears before, into equal parts, in order.
        shapes: (kept layer, path of a linear within it) → its outputs and inputs after the cut, where some are removed.
        config: entries of the family's own config that give these shapes; empty where it can't, and the model is then saved
            in a form of its own.
    """

    title: str
    removed_layers: list[int]
    transforms: dict[int, Tensor] = field(default_factory=dict)
    corrections: dict[tuple[int, Linear], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    mixtures: dict[int, dict[int, float]] = field(default_factory=dict)
    channels: dict[int, Tensor] = field(default_factory=dict)
    operators: dict[int, Tensor] = field(default_factory=dict)
    parameters: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    without_attention: dict[int, tuple[str, str]] = field(default_factory=dict)
    bases: list[Tensor] = field(default_factory=list)
    kept: dict[tuple[int, Linear], Tensor] = field(default_factory=dict)
    shapes: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    parts: str = ""

    def basis(self, signal: int) -> Tensor:
        """Return Q (d, width) of a signal: 2 l is the input of layer l, 2 l + 1 that of its MLP's norm, 2 L the last norm's."""
        return self.bases[signal if len(self.bases) > 1 else 0]

    @property
    def width(self) -> int | None:
        """Width of the narrower residual stream; None where the stream keeps its width."""
        return self.bases[0].shape[1] if self.bases else None

    @property
    def stream_scale(self) -> float:
        """√(width / d), by which a narrower state is computed smaller: its mean square is then that of the whole state."""
        return math.sqrt(self.bases[0].shape[1] / self.bases[0].shape[0]) if self.bases else 1.0

    def as_dense(self, layer: int, state: Tensor) -> Tensor:
        """Convert the shortened model's state after a kept layer, (tokens, width), to the dense model's basis and scale."""
        if self.bases:
            return state.double() @ self.basis(2 * (layer + 1)).T.to(state.device).double() / self.stream_scale
        return self.scale(layer + 1) * state

    def as_pruned(self, layer: int, state: Tensor) -> Tensor:
        """Convert the dense model's state before a layer, (tokens, d), to the shortened model's basis and scale."""
        if self.bases:
            return state.double() @ self.basis(2 * layer).to(state.device).double() * self.stream_scale
        return state / self.scale(layer)

    def scale(self, layer: int) -> float:
        """Return the product of the scalar operators before ``layer``: the factor of the state that enters it."""
        scalars = (float(P) for place, P in self.operators.items() if P.ndim == 0 and place < layer)
        return math.prod(scalars)

    def within(self, layers: Collection[int]) -> Edits:
        """Return the changes of some kept layers alone; the operators stay, since scalars act on all later layers."""
        return replace(
            self,
            transforms={at: value for at, value in self.transforms.items() if at in layers},
            corrections={at: value for at, value in self.corrections.items() if at[0] in layers},
            mixtures={at: value for at, value in self.mixtures.items() if at in layers},
            channels={at: value for at, value in self.channels.items() if at in layers},
            parameters={at: value for at, value in self.parameters.items() if at[0] in layers},
            kept={at: value for at, value in self.kept.items() if at[0] in layers},
        )

    def form(self, layers: str) -> dict[str, Any]:
        """Return what ``replaceme.models.modeling_pruned`` changes in the family's own form; empty where that form is kept.

        Args:
            layers: path of the list of decoder layers in the model.
        """
        parts: dict[str, Any] = {}
        if operators := {self.position(at): P.ndim for at, P in sorted(self.operators.items()) if P.ndim}:
            parts["operators"] = {str(at): "diagonal" if ndim == 1 else "dense" for at, ndim in operators.items()}
        if self.without_attention:
            parts["without_attention"] = {
                str(self.position(at)): [*paths] for at, paths in sorted(self.without_attention.items())
            }
        if len(self.bases) > 1:
            parts |= {"shortcuts": True, "width": self.width}
        if self.shapes and not self.config:
            linears = {(self.position(layer), path): shape for (layer, path), shape in sorted(self.shapes.items())}
            parts["linears"] = {f"{layers}.{place}.{path}": [*shape] for (place, path), shape in linears.items()}
        return {"layers": layers, **parts} if parts else {}

    def position(self, layer: int) -> int:
        """Return the index of a kept layer in the shortened model."""
        return layer - sum(removed < layer for removed in self.removed_layers)

    def changes(self) -> dict[tuple[int, Linear], Change]:
        """Return the transforms and corrections, by layer and linear."""
        edited: set[tuple[int, Linear]] = {*self.corrections}
        edited.update((layer, "mlp_output") for layer in self.transforms)
        return {
            (layer, linear): Change(
                self.transforms.get(layer) if linear == "mlp_output" else None,
                *self.corrections.get((layer, linear), (None, None)),
            )
            for layer, linear in sorted(edited)
        }

    def correct(self, layer: int, linear: Linear, weight: Tensor, bias: Tensor | None = None) -> None:
        """Add Δ (d, inputs) and δ (d,) to a linear's correction."""
        if (layer, linear) in self.corrections:
            old_weight, old_bias = self.corrections[layer, linear]
            weight = old_weight + weight
            bias = old_bias if bias is None else bias if old_bias is None else old_bias + bias
        self.corrections[layer, linear] = weight.float(), None if bias is None else bias.float()

    def correct_all(self, layer: int, parts: Iterable[tuple[Linear, Tensor, Tensor | None]]) -> None:
        """Add solved corrections of a layer's linears: for each, Δ (d, inputs) and δ (d,) or None, from any device."""
        for linear, weight, bias in parts:
            own = None if bias is None else bias.cpu().clone()
            self.correct(layer, linear, weight.cpu().contiguous(), own)

    def save(self, folder: Path) -> None:
        """Write ``edits.json`` and ``edits.safetensors`` into ``folder``."""
        content: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, kind in KINDS.items():
            value = getattr(self, name)
            content[name] = kind.to_json(value)
            tensors |= kind.tensors(value)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous or {"none": torch.zeros(1)}, folder / "edits.safetensors")
        write_json(folder / "edits.json", content)

    @classmethod
    def load(cls, folder: Path) -> Edits:
        """Read what ``save`` wrote. The tensors are mapped from the file."""
        content = read_json(folder / "edits.json")
        tensors = load_file(folder / "edits.safetensors")
        return cls(**{name: kind.read(content[name], tensors) for name, kind in KINDS.items()})


@dataclass(frozen=True)
class Kind:
    """How one field of ``Edits`` is stored.

    Attributes:
        to_json: returns the field's entry in edits.json.
        read: returns the field, given that entry and all tensors of edits.safetensors.
        tensors: returns the field's tensors by name; by default it has none.
    """

    to_json: Callable[[Any], Any]
    read: Callable[[Any, dict[str, Tensor]], Any]
    tensors: Callable[[Any], dict[str, Tensor]] = lambda _: {}


def _rows(row: Callable[..., tuple[Any, ...]], item: Callable[..., tuple[Any, Any]]) -> Kind:
    """Return the kind of a dict without tensors: ``row`` turns a key and value into a list for edits.json, ``item`` back."""
    return Kind(
        lambda values: [row(*pair) for pair in sorted(values.items())], lambda rows, _: dict(item(*each) for each in rows)
    )


def _tensors(prefix: str) -> Kind:
    """Return the kind of a dict of tensors: its keys are in edits.json, and a tensor is named by the prefix and its key."""
    return Kind(
        sorted,
        lambda keys, tensors: {_key(each): tensors[_name(prefix, each)] for each in keys},
        lambda values: {_name(prefix, key): tensor for key, tensor in values.items()},
    )


def _linears(prefix: str) -> Kind:
    """Return the kind of a dict of weights with biases or None: like ``_tensors``, with ``.weight`` and ``.bias`` appended."""

    def read(keys: list[Any], tensors: dict[str, Tensor]) -> dict[Any, tuple[Tensor, Tensor | None]]:
        names = {_key(each): _name(prefix, each) for each in keys}
        return {key: (tensors[f"{name}.weight"], tensors.get(f"{name}.bias")) for key, name in names.items()}

    def tensors(values: dict[Any, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        weights = {f"{_name(prefix, key)}.weight": weight for key, (weight, _) in values.items()}
        return weights | {f"{_name(prefix, key)}.bias": bias for key, (_, bias) in values.items() if bias is not None}

    return Kind(sorted, read, tensors)


def _key(entry: Any) -> Any:
    """Return a key as it was before JSON turned its tuple into a list."""
    return tuple(entry) if isinstance(entry, list) else entry


def _name(prefix: str, key: Any) -> str:
    """Return the name of a tensor: its prefix and the parts of its key, joined by dots."""
    return ".".join(map(str, (prefix, *key) if isinstance(key, list | tuple) else (prefix, key)))


_AS_IT_IS = Kind(lambda value: value, lambda entry, _: entry)
# How each field is stored; ``save`` and ``load`` follow from this.
KINDS: dict[str, Kind] = {
    "title": _AS_IT_IS,
    "removed_layers": _AS_IT_IS,
    "transforms": _tensors("transform"),
    "corrections": _linears("correction"),
    "mixtures": _rows(lambda layer, mixture: (layer, [*mixture.items()]), lambda layer, mixture: (layer, dict(mixture))),
    "channels": _tensors("channels"),
    "operators": _tensors("operator"),
    "parameters": _tensors("parameter"),
    "without_attention": _rows(lambda layer, paths: (layer, *paths), lambda layer, *paths: (layer, paths)),
    "bases": Kind(
        len,
        lambda count, tensors: [tensors[f"basis.{signal}"] for signal in range(count)],
        lambda bases: {f"basis.{signal}": Q for signal, Q in enumerate(bases)},
    ),
    "kept": _tensors("kept"),
    "shapes": _rows(lambda place, shape: (*place, *shape), lambda layer, path, *shape: ((layer, path), tuple(shape))),
    "config": _AS_IT_IS,
    "parts": _AS_IT_IS,
}
