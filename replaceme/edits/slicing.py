"""A narrower residual stream (SliceGPT, arXiv 2401.15024, sections 3.2 and 3.3): the parameters and config of the sliced model.

The stream has 2 L + 1 signals, each read through an RMS norm alone: the inputs of the attention's norm and of the MLP's norm in
each layer, and of the last norm. Each signal has a basis Q (d, width) with orthonormal columns. The model that projects its
stream there, ``h ← h Q Qᵀ``, is computed with ``z = h Q``, width entries per token (torch's layout, y = x Wᵀ + b):

    embedding           E ← E Q                   linears that read the stream  W ← W diag(γ) Q,  γ ← 1
    linears that add    W ← Q'ᵀ W,  b ← Q'ᵀ b     shortcut                      z ← z QᵀQ'  (no shortcut where Q' = Q)

with Q' of the next signal, since ``‖h Q Qᵀ‖ = ‖z‖``. An RMS norm divides by the root mean square over d entries. Over width
entries it is the same for a z that is √(width / d) times as large. Hence everything added to the stream is multiplied by this
factor, the weights that read it are divided by it, and no epsilon changes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.edits.edits import Edits
from replaceme.models.families import Family, linears_within

# The same in all families that have ``rms_norms``.
EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SHORTCUTS = ("attention_shortcut.weight", "mlp_shortcut.weight")
# Rows of a weight multiplied at once.
ROWS = 4096


def sliced_parameters(model: nn.Module, family: Family, edits: Edits) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter of the narrower model that differs from the dense model's: its name and its value (float64).

    Args:
        model: the dense model. A parameter can be overwritten once it has been yielded.
        family: describes the model's parts.
        edits: gives the bases.
    """
    layers, scale = family.decoder_layers(model), edits.stream_scale
    ones = torch.ones_like(edits.basis(0)[0]).double()

    def weight(name: str) -> Tensor:
        return model.get_parameter(name).detach().double()

    def basis(signal: int) -> Tensor:
        return edits.basis(signal).double()

    def times(name: str, Q: Tensor) -> Tensor:
        # In parts: a whole embedding in float64 can be larger than a small model.
        return torch.cat([rows.double() @ Q for rows in model.get_parameter(name).detach().split(ROWS)])

    def reads(name: str, norm: str, Q: Tensor) -> Tensor:
        return times(name, weight(norm)[:, None] * Q / scale)

    # The head comes before the embedding, whose weights it may share.
    yield HEAD, reads(HEAD, LAST_NORM, basis(2 * len(layers)))
    yield LAST_NORM, ones
    yield EMBEDDING, times(EMBEDDING, basis(0) * scale)
    ends = (family.attention, family.attention_output), (family.mlp, family.mlp_output)
    for index, layer in enumerate(layers):
        prefix = f"{family.layers}.{index}."
        for part, (place, end) in enumerate(ends):
            Q, next_Q = basis(2 * index + part), basis(2 * index + part + 1)
            norm = f"{prefix}{family.rms_norms[part]}.weight"
            for path in linears_within(layer.get_submodule(place)):
                if f"{place}.{path}" != end:
                    name = f"{prefix}{place}.{path}.weight"
                    yield name, reads(name, norm, Q)
            yield norm, ones
            for name in (f"{prefix}{end}.{kind}" for kind, _ in layer.get_submodule(end).named_parameters()):
                yield name, (next_Q * scale).T @ weight(name)
            if len(edits.bases) > 1:
                yield prefix + SHORTCUTS[part], Q.T @ next_Q


def narrow(config: Any, edits: Edits) -> None:
    """Change a config to the narrower model's; ``hidden_size`` only with a single basis, which the family's own class loads."""
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    config.tie_word_embeddings = False
    if len(edits.bases) == 1:
        config.hidden_size = edits.width
