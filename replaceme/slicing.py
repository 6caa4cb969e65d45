"""Make a model's residual stream narrower (SliceGPT, arXiv 2401.15024, sections 3.2 and 3.3), and find how narrow it is to be.

The stream has 2 L + 1 signals, each seen through an RMS norm alone: what enters the attention's norm and the MLP's of each
layer, and the last norm. With a basis Q (d, width) at each, orthonormal in its columns, the model that projects its stream
there, ``h ← h Q Qᵀ``, can be computed in ``z = h Q``, width entries a token (torch's layout, y = x Wᵀ + b):

    embedding  E ← E Q                   what reads   W ← W diag(γ) Q,  γ ← 1
    what adds  W ← Q'ᵀ W,  b ← Q'ᵀ b     shortcut     z ← z QᵀQ'       (Q' of the signal behind; nothing, where Q' = Q)

since ``‖h Q Qᵀ‖ = ‖z‖``. The norm divides by the mean over d entries. That over the width is the same where z is √(width / d)
times as large: what is added to the stream is multiplied by this, what reads it divided, and no epsilon changes.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.edits import Edits
from replaceme.errors import ParameterError
from replaceme.families import Family, linears_within

# In all families that have ``rms_norms``.
EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SHORTCUTS = ("attention_shortcut.weight", "mlp_shortcut.weight")
# Widths are multiples of it, as processors like them.
STEP = 8
# Rows of a weight that are multiplied at once.
ROWS = 4096


def sliced_parameters(model: nn.Module, family: Family, edits: Edits) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of the narrower model that is not the dense model's: its name, and what it is (float64).

    Args:
        model: the dense model. What has been yielded is not needed again and can be overwritten.
        family: where its parts are.
        edits: the bases.
    """
    layers, scale = family.decoder_layers(model), edits.stream_scale
    ones = torch.ones_like(edits.basis(0)[0]).double()

    def weight(name: str) -> Tensor:
        return model.get_parameter(name).detach().double()

    def basis(signal: int) -> Tensor:
        return edits.basis(signal).double()

    def times(name: str, Q: Tensor) -> Tensor:
        # A part at a time: an embedding in float64 would be larger than a small model.
        return torch.cat([rows.double() @ Q for rows in model.get_parameter(name).detach().split(ROWS)])

    def reads(name: str, norm: str, Q: Tensor) -> Tensor:
        return times(name, weight(norm)[:, None] * Q / scale)

    # The head before the embedding, whose weights it may share.
    yield HEAD, reads(HEAD, LAST_NORM, basis(2 * len(layers)))
    yield LAST_NORM, ones
    yield EMBEDDING, times(EMBEDDING, basis(0) * scale)
    ends = (family.attention, family.attention_output), (family.mlp, family.mlp_output)
    for index, layer in enumerate(layers):
        prefix = f"{family.layers}.{index}."
        for part, (place, end) in enumerate(ends):
            Q, behind = basis(2 * index + part), basis(2 * index + part + 1)
            norm = f"{prefix}{family.rms_norms[part]}.weight"
            for path in linears_within(layer.get_submodule(place)):
                if f"{place}.{path}" != end:
                    name = f"{prefix}{place}.{path}.weight"
                    yield name, reads(name, norm, Q)
            yield norm, ones
            for name in (f"{prefix}{end}.{kind}" for kind, _ in layer.get_submodule(end).named_parameters()):
                yield name, (behind * scale).T @ weight(name)
            if len(edits.bases) > 1:
                yield prefix + SHORTCUTS[part], Q.T @ behind


def narrow(config: Any, edits: Edits) -> None:
    """Write into a config what the narrower model is; the width itself only where the family's own class takes it."""
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.tie_word_embeddings = False
    if len(edits.bases) == 1:
        config.hidden_size = edits.width


def fitting_width(model: Any, family: Family, layers: int, one_basis: bool) -> tuple[int, int, int]:
    """Return the width at which the model is nearest to the dense one without ``layers`` average layers, and both's parameters.

    Everything counts: the head that is tied no more, and the shortcuts.

    Args:
        model: the dense model.
        family: its description.
        layers: how many layers' parameters are to go.
        one_basis: whether one basis serves all signals: then there are no shortcuts, and the width is a multiple of the heads'
            number, too, which families' own classes ask for.

    Raises:
        ParameterError: there is no narrower width.
    """
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    d, heads = int(model.config.hidden_size), int(model.config.num_attention_heads)
    step = math.lcm(STEP, heads) if one_basis else STEP
    widths = range(step, d, step)
    if not widths:
        raise ParameterError(
            f"plain: the width would be a multiple of {step}, for {heads} attention heads, and the model's is {d}; use false."
        )
    blocks = family.decoder_layers(skeleton)
    total, of_layers = (sum(parameter.numel() for parameter in part.parameters()) for part in (skeleton, blocks))
    target = total - layers * of_layers / len(blocks)
    count = len(blocks) * 2 + 1

    def size(width: int) -> int:
        edits = Edits("", [], bases=[torch.empty(d, width, device="meta")] * (1 if one_basis else count))
        parts = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
        return sum((parts | {name: exact.numel() for name, exact in sliced_parameters(skeleton, family, edits)}).values())

    width = nearest(widths, target, size)
    return width, size(width), total


def nearest(widths: Sequence[int], target: float, size: Callable[[int], int]) -> int:
    """Return the width whose size, which grows with it, is nearest to the target."""
    above = bisect_left(widths, target, key=size)
    return min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(size(width) - target))
