"""The residual of a linear map in the place of a block of layers, for every possible cut.

For the layer ``i`` before a cut and its last removed layer ``j``, with rows of sampled tokens, ``M`` the output of i's MLP,
``Z = h_i − M`` and ``H = h_j``:

    T = argmin Σ w ‖H − Z − M T‖² + λ‖T‖²,   w = 1/‖H‖²
    residual(i, j) = √ mean over held-out tokens of ‖H − Z − M T‖²/‖H‖²

Without the weights, a few tokens of massive norm would decide the fit. The angular distance ignores norms and cannot tell which
differences a linear map corrects. The tokens are a seeded sample, several times as many as dimensions, in memory-mapped scratch
files; held-out tokens come from other texts than the fit's. Statistics of all tokens for all pairs would cost more than the
forward pass.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from replaceme.base.accelerators import float64_device, to_device
from replaceme.base.documents import HELD_OUT_EVERY, Batch, Documents, seeded_order, split_indices
from replaceme.base.group import all_reduce_sum, merge_rows, shard
from replaceme.base.progress import progress
from replaceme.base.scratch import scratch, unmap
from replaceme.statistics.sums import squares, token_weights
from replaceme.statistics.walk import Signal, Signals, signals_for

# Tokens of the fit per dimension of the hidden state, and held-out tokens per token of the fit.
FIT_TOKENS, HELD_OUT_SHARE = 4, 0.25
# λ, in units of the mean diagonal of the Gram matrix; independent of the parameter alpha.
RIDGE = 1e-3
SEED = 0


class TokenSample:
    """Observer that keeps M and h of sampled tokens, at every layer, in scratch files; a context manager.

    Attributes:
        mlp_output: (layers, tokens, d) the output of each layer's MLP; first the tokens of the fit, then the held-out ones.
        output: (layers, tokens, d) each layer's output, in the same order.
        fit, held_out: (n,) ascending: the tokens' positions in the walk.
    """

    mlp_output: Tensor
    output: Tensor

    def __init__(self, documents: Documents, layers: int, width: int, dtype: torch.dtype, folder: Path | None):
        """Choose the tokens.

        Args:
            documents: the documents of the walk.
            layers: number of layers.
            width: d.
            dtype: of the model's states, and of the scratch files.
            folder: for the scratch files; None is the system's temporary folder.
        """
        self.layers, self.width, self.dtype, self.folder = layers, width, dtype, folder
        self.fit, self.held_out = choose_tokens(documents, FIT_TOKENS * width)

    def __enter__(self) -> "TokenSample":
        shape = (self.layers, len(self.fit) + len(self.held_out), self.width)
        self.mlp_output, self.output = scratch([shape] * 2, self.dtype, self.folder, "profiling")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        del self.mlp_output, self.output

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return signals_for(range(self.layers), "mlp", "output")

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        bounds = torch.tensor([batch.position, batch.position + batch.token_count])
        mlp_output, output = batch.real(signals["mlp"]), batch.real(signals["output"])
        parts = (self.fit, 0), (self.held_out, len(self.fit))
        spans = [slice(*torch.searchsorted(tokens, bounds).tolist()) for tokens, _ in parts]
        rows = torch.cat([tokens[span] for (tokens, _), span in zip(parts, spans, strict=True)]) - batch.position
        rows = to_device(rows, output.device)
        # One copy for all: each waits for the device.
        chosen = torch.stack([states.index_select(0, rows) for states in (mlp_output, output)]).cpu()
        for whole, states in ((self.mlp_output, chosen[0]), (self.output, chosen[1])):
            for (_, offset), span, own in zip(parts, spans, states.split([s.stop - s.start for s in spans]), strict=True):
                stored = whole[layer, offset + span.start : offset + span.stop]
                stored.copy_(own)
                unmap(stored)

    def all_reduce(self) -> None:
        merge_rows(self.mlp_output)
        merge_rows(self.output)


def choose_tokens(documents: Documents, fit_tokens: int) -> tuple[Tensor, Tensor]:
    """Return sampled positions in the walk, ascending int64: (n,) for the fit and (m,) held out.

    Held-out tokens come from other texts than the fit's if there are at least ``HELD_OUT_EVERY`` documents, of several texts.
    """
    ordered = documents.in_walk_order()
    lengths = torch.tensor([len(document) for document in ordered.documents])
    of_document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    _, held_out = split_indices(ordered.sources, HELD_OUT_EVERY)
    if held_out:
        fit = ~torch.isin(of_document, torch.tensor(held_out))
    else:
        fit = torch.arange(len(of_document)) < min((1 - HELD_OUT_SHARE) * len(of_document), len(of_document) - 1)
    order = seeded_order(len(of_document), SEED)
    held_out_tokens = max(int(HELD_OUT_SHARE * fit_tokens), 1)
    return order[fit[order]][:fit_tokens].sort().values, order[~fit[order]][:held_out_tokens].sort().values


def residual_map(sample: TokenSample, device: torch.device | str) -> list[list[float]]:
    """Return (layers × layers): residual(layer before the cut, last removed layer), relative; 0 unless the second is later."""
    residuals = torch.zeros(sample.layers, sample.layers, dtype=torch.float64)
    count = len(sample.fit)
    # Then products of tokens are the smaller matrix, and the same for every last layer.
    few = count < sample.width
    # Of every layer that can end a block: all but the first.
    weights = []
    for H in sample.output[1:]:
        weights.append(token_weights(H.to(device).float()))
        unmap(H)
    # Allocated once: allocating tensors of this size costs as much as computing with them.
    Y, weighted = (torch.empty(rows, sample.width, device=device) for rows in (len(sample.output[0]), 0 if few else count))
    own = [layer for layer in range(sample.layers - 1) if shard().owns(layer)]
    for layer in progress(own, "fitting every cut", "layers"):
        M = sample.mlp_output[layer].to(device).float()
        Z = sample.output[layer].to(device).float() - M
        products = M @ M[:count].T if few else None
        errors = []
        for last, w in enumerate(weights[layer:], start=layer + 1):
            torch.sub(to_device(sample.output[last], device), Z, out=Y)
            goal, root = Y[:count], w[:count].sqrt()
            goal *= root
            if products is not None:
                kernel = products[:count] * root * root.T
                # M T = M Mᵀ √w A, with (√w M Mᵀ √w + λI) A = √w (H − Z)
                A = solve_small_ridge(kernel, goal, sample.width)
                error = Y[count:].addmm_(products[count:], A.mul_(root), alpha=-1)
            else:
                torch.mul(M[:count], root, out=weighted)
                T = solve_small_ridge(squares(weighted), weighted.T @ goal, sample.width)
                error = Y[count:].addmm_(M[count:], T, alpha=-1)
            errors.append((error.square().sum(dim=1, keepdim=True) * w[count:]).mean().sqrt())
        residuals[layer, layer + 1 :] = torch.stack(errors).cpu()
    all_reduce_sum({"residuals": residuals})
    return residuals.tolist()


def solve_small_ridge(gram: Tensor, cross: Tensor, width: int) -> Tensor:
    """Solve ``(gram + λI) T = cross`` with the ridge ``RIDGE``, in the format of ``gram``.

    Args:
        gram: (d, d), or the products of tokens (n, n), which have the same trace.
        cross: (d, d) or (n, d).
        width: d.
    """
    device, solved_on = gram.device, float64_device(gram.device)
    gram, cross = gram.to(solved_on), cross.to(solved_on)
    # The Gram matrix is 0 if the MLP before the cut adds nothing.
    ridge = RIDGE * (gram.diagonal().sum() / width).clamp_min(1e-20)
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:  # singular to float32
        return torch.linalg.solve(gram.double(), cross.double()).to(gram.dtype).to(device)
    return torch.cholesky_solve(cross, factor).to(device)
