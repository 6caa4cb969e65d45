"""Make a model's residual stream narrower (SliceGPT, arXiv 2401.15024, sections 3.2 and 3.3), and find how narrow it is to be.

The stream has 2 L + 1 signals, each seen through an RMS norm alone: what enters the attention's norm and the MLP's of each
layer, and the last norm. With a basis Q (d, width) at each, orthonormal in its columns, the model that projects its stream
there, ``h ← h Q Qᵀ``, can be computed in ``z = h Q``, width entries a token (torch's layout, y = x Wᵀ + b):

    embedding  E ← E Q                   what reads   W ← W diag(γ) Q,  γ ← 1
    what adds  W ← Q'ᵀ W,  b ← Q'ᵀ b     shortcut     z ← z QᵀQ'       (Q' of the signal behind; nothing, where Q' = Q)

since ``‖h Q Qᵀ‖ = ‖z‖``. The norm divides by the mean over d entries. That over the width is the same where z is √(width / d)
times as large: what is added to the stream is multiplied by this, what reads it divided, and no epsilon changes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.edits.edits import Edits
from replaceme.models.families import Family, linears_within

# In all families that have ``rms_norms``.
EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SHORTCUTS = ("attention_shortcut.weight", "mlp_shortcut.weight")
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
