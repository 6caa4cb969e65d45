"""The cost of a few cuts: the next-token loss of the shortened model, with a closed-form fit in the block's place.

The fit has its own token weights and ridges, so that the choice does not depend on α or on a solver. It is one of:

- a linear map, as in the profile's residuals (``replaceme.statistics.residuals``);
- all weights of the last linear before the cut, or of both last linears of that layer (``replaceme.solvers.refit``), which can
  rank the cuts differently;
- a scalar (``replaceme.selection.compensation``).

It is fitted on the documents that the profile fits on; the loss is measured on those that the profile holds out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.base.documents import HELD_OUT_EVERY, Batch, excerpts_of, part_of, split_documents
from replaceme.base.errors import ParameterError
from replaceme.base.group import all_reduce_sum
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Surrogate
from replaceme.base.progress import logger, progress
from replaceme.edits.edits import Edits
from replaceme.models.context import ModelContext
from replaceme.models.families import Linear, parameter_of
from replaceme.models.streaming import LazyParameter
from replaceme.selection.blocks import smallest_of_each
from replaceme.selection.candidate_evaluation import CandidateEvaluation, Losses, batches_of, next_token_losses
from replaceme.selection.compensation import measure_gains
from replaceme.solvers.refit import refit
from replaceme.statistics.cut_statistics import CutStatistic, FeatureGram
from replaceme.statistics.features import LINEARS, Features
from replaceme.statistics.residuals import RIDGE, solve_small_ridge
from replaceme.statistics.sums import squares, token_weights
from replaceme.statistics.walk import walk

# Number of measured cuts, and the tokens that each is fitted and measured on, at most: measured on 4096, two good cuts can't be
# told apart.
SHORTLIST, TOKENS = 6, 16_384
# λ of a refit, and the bytes that the sums of the cuts fitted in one pass may take.
REFIT_RIDGE, GRAM_BYTES = 0.3, 4 << 30

# The linears solved for, by surrogate.
LINEARS_OF: Mapping[Surrogate, Sequence[Linear]] = {"refit": ("mlp_output",), "joint": LINEARS}


@dataclass(frozen=True)
class Measured:
    """A cut, the rise of the loss of a typical domain, and the mean loss over all tokens, in nats."""

    block: Block
    rise: float
    loss: float


class WeightedGram(CutStatistic):
    """``Σ w mᵀm`` and ``Σ w mᵀy`` (d, d) with ``w = 1/‖H‖²``; float32, as in the profile."""

    def __init__(self, block: Block):
        super().__init__(block)
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def take(self, mlp_output: Tensor, output_before_cut: Tensor, target: Tensor, batch: Batch) -> None:
        M, H = mlp_output.float(), target.float()
        root = token_weights(H).sqrt()
        weighted = M * root
        self.gram = self.gram + squares(weighted)
        self.cross = self.cross + weighted.T @ ((H - output_before_cut.float() + M) * root)

    def all_reduce(self) -> None:
        sums = {name: total for name, total in vars(self).items() if name in ("gram", "cross") and isinstance(total, Tensor)}
        all_reduce_sum(sums)
        vars(self).update(sums)


class DerivedGram(FeatureGram):
    """The sums over M, derived from those over the features, which M is linear in: float32 accuracy, a third less work."""

    def __init__(self, block: Block, features: Features, last: nn.Module):
        super().__init__(block, features)
        self.signals_before_cut = ("output", *features.signals)
        rows = [parameter_of(last, "weight").cpu().double().T]
        if features.biased == "mlp_output":
            rows.append(parameter_of(last, "bias").cpu().double()[None])
        # M does not depend on the attention's features.
        _, columns = features.only("mlp_output")
        self.map = torch.zeros(len(features), rows[0].shape[1], dtype=torch.float64)
        self.map[columns] = torch.cat(rows)

    def take(self, *signals: Any) -> None:
        output_before_cut, *inputs, target, _batch = signals
        self.take_features(output_before_cut, inputs, target)

    def solvable_sums(self) -> dict[str, Tensor]:
        sums = super().solvable_sums()
        of_features = self.map.to(sums["gram"].device)
        feature_added = sums["gram"] @ of_features
        of_mlp_output = {"added_gram": of_features.T @ feature_added, "added_cross": of_features.T @ sums["cross"]}
        return {**sums, "feature_added": feature_added, **of_mlp_output}


def feature_gram(block: Block, features: Features, last: nn.Module) -> FeatureGram:
    """Return the observer of a cut's sums; if packed or offloaded weights can't be read, it observes M itself."""
    weight = last.get_parameter("weight")
    readable = weight.is_floating_point() and (not weight.is_meta or isinstance(weight, LazyParameter))
    return DerivedGram(block, features, last) if readable else FeatureGram(block, features)


def dense_losses(context: ModelContext) -> Losses:
    """Return the next-token losses of the dense model, on the text of ``cut_losses``.

    Raises:
        ParameterError: there are too few documents to hold one out.
    """
    _, excerpts = _split(context)
    return next_token_losses(excerpts, batches_of(excerpts))


def cut_losses(context: ModelContext, blocks: Sequence[Block], surrogate: Surrogate) -> list[Losses]:
    """Return the next-token losses with each of the blocks removed.

    Args:
        context: the dense model and its calibration text.
        blocks: the cuts.
        surrogate: what takes the block's place.

    Raises:
        ParameterError: there are too few documents to hold one out.
    """
    fit, excerpts = _split(context)
    cuts = [Edits("", [*block.layers]) for block in blocks]
    if surrogate == "map":
        _fit_maps(fit, blocks, cuts)
    elif surrogate in LINEARS_OF:
        _refit(fit, blocks, cuts, LINEARS_OF[surrogate])
    elif surrogate == "scalar":
        for block, edits, gain in zip(blocks, cuts, measure_gains(fit, blocks), strict=True):
            edits.operators[block.layer_before_cut] = torch.tensor(gain, dtype=torch.float64)
    evaluation = CandidateEvaluation.before_cuts(excerpts, blocks)
    losses = []
    for block, edits in zip(progress(blocks, "measuring the best cuts", "cuts"), cuts, strict=True):
        with evaluation.candidate(edits, block.layer_before_cut) as batches:
            losses.append(next_token_losses(excerpts, batches))
    return losses


def _split(context: ModelContext) -> tuple[ModelContext, ModelContext]:
    """Return the context with the documents for fitting a surrogate, and with the text for measuring losses."""
    documents = context.documents
    fit, held_out = split_documents(documents)
    excerpts = excerpts_of(held_out, TOKENS)
    if not len(excerpts):
        raise ParameterError(
            f"selection: loss holds out every {HELD_OUT_EVERY}th text, and none of those held out has two tokens; give more "
            f"than {len(set(documents.sources))} texts ({len(documents)} documents), or use residual."
        )
    return context.with_documents(part_of(fit, TOKENS)), context.with_documents(excerpts)


def _fit_maps(context: ModelContext, blocks: Sequence[Block], cuts: Sequence[Edits]) -> None:
    family, grams = context.family, [WeightedGram(block) for block in blocks]
    walk(context, grams, description="fitting the best cuts")
    for block, edits, sums in zip(blocks, cuts, grams, strict=True):
        gram = torch.as_tensor(sums.gram)
        transform = solve_small_ridge(gram, torch.as_tensor(sums.cross), len(gram))
        if family.norm_after_mlp:  # a dense map, which ranks the cuts and is never folded
            transform = family.norm_weight(context.layers[block.layer_before_cut]).to(transform)[:, None] * transform
        edits.transforms[block.layer_before_cut] = transform


def _refit(context: ModelContext, blocks: Sequence[Block], cuts: Sequence[Edits], linears: Sequence[Linear]) -> None:
    layers, family, width = context.layers, context.family, context.width
    features = [Features.of(layers[block.layer_before_cut], family, linears) for block in blocks]
    last_linears = [family.linear_of(layers[block.layer_before_cut], "mlp_output") for block in blocks]
    inputs = len(features[0])
    at_once = max(GRAM_BYTES // (8 * (inputs**2 + 2 * inputs * width + 2 * width**2)), 1)
    for first in range(0, len(blocks), at_once):
        part = range(first, min(first + at_once, len(blocks)))
        grams = {number: feature_gram(blocks[number], features[number], last_linears[number]) for number in part}
        walk(context, [*grams.values()], description="fitting the best cuts")
        for number, gram in progress(grams.items(), "solving for the best cuts", "cuts"):
            sums = gram.solvable_sums()
            # An MLP that adds nothing has no map to start from: this cut is measured without a fit.
            if alpha := RIDGE * float(sums["added_gram"].diagonal().mean()):
                refit(cuts[number], blocks[number].layer_before_cut, sums, alpha, REFIT_RIDGE)


@dataclass(frozen=True)
class _CutSearch:
    """Measures the best blocks of one number of layers after the other.

    Attributes:
        context, rankings, surrogate: as of ``lowest_loss``.
        first, end: the first layer that may go, and the one after the last.
        dense: the losses of the dense model.
        tried: number of layers → its best few blocks, the lowest rise first.
    """

    context: ModelContext
    rankings: Sequence[list[list[float]]]
    surrogate: Surrogate
    first: int
    end: int
    dense: Losses
    tried: dict[int, list[Measured]] = field(default_factory=dict)

    def rise(self, count: int) -> float:
        """Measure the best blocks of ``count`` layers, and return the lowest rise of the loss; infinity if all overflow."""
        starts = range(self.first, self.end - count + 1)
        blocks = smallest_of_each(self.rankings, starts, count, SHORTLIST // len(self.rankings))
        losses, weights = cut_losses(self.context, blocks, self.surrogate), self.context.documents.tokens_by_domain
        measured = [
            Measured(block, cut.rise_over(self.dense, weights), cut.mean) for block, cut in zip(blocks, losses, strict=True)
        ]
        self.tried[count] = sorted((cut for cut in measured if math.isfinite(cut.rise)), key=lambda cut: cut.rise)
        lowest = self.tried[count][0].rise if self.tried[count] else math.inf
        logger.info(
            "select: without %s, the loss of a typical kind of text rises by %.4f nats on held-out calibration text, before "
            "any repair", f"{count} layers" if count > 1 else "1 layer", lowest,
        )  # fmt: skip
        return lowest

    def figures(self, count: int) -> dict[str, Any]:
        """Return the figures of the measured blocks of ``count`` layers."""
        cuts = self.tried[count]
        return {
            "loss": cuts[0].loss,
            "dense_loss": self.dense.mean,
            "losses": {f"host{cut.block.layer_before_cut}": cut.loss for cut in cuts},
            "typical_rises": {f"host{cut.block.layer_before_cut}": cut.rise for cut in cuts},
        }


def lowest_loss(
    context: ModelContext, params: Params, rankings: Sequence[list[list[float]]], starts: range, surrogate: Surrogate
) -> tuple[list[Block], dict[str, Any]]:
    """Return the block whose removal raises the loss least, and the figures of the measured ones.

    What counts is the typical rise over the domains of the text (``Losses.rise_over``), each with its share of all the text.

    Args:
        context: the dense model and its calibration text.
        params: ``layers_to_skip`` layers go; with ``tolerated_loss``, at most these, as many as raise the loss by no more.
        rankings: values (layer before the cut × last removed layer) each; the ``SHORTLIST`` smallest are measured.
        starts: the allowed starts of a block of ``layers_to_skip`` layers.
        surrogate: what takes the block's place.

    Raises:
        ParameterError: the predictions overflow, or no layer can go for ``tolerated_loss``.
    """
    dense, limit = dense_losses(context), params.layers_to_skip
    if not math.isfinite(dense.mean):
        raise ParameterError(f"dtype: {params.dtype} overflows in the model's predictions; use bfloat16 or float32.")
    search = _CutSearch(context, rankings, surrogate, starts.start, starts.stop - 1 + limit, dense)
    if params.tolerated_loss is None:
        count = limit
        search.rise(count)
    else:
        count = _most_within(params.tolerated_loss, limit, search.rise)
    tried = search.tried
    if not tried[max(count, 1)]:
        raise ParameterError(f"dtype: {params.dtype} overflows in every shortened model; use bfloat16 or float32.")
    if not count:
        raise ParameterError(
            f"tolerated_loss: the loss rises by {tried[1][0].rise:.4f} nats without one layer, and {params.tolerated_loss:g} "
            "are tolerated; take more, or null."
        )
    figures = search.figures(count)
    if params.tolerated_loss is not None:
        figures["rises"] = {f"layers{each}": tried[each][0].rise for each in sorted(tried) if tried[each]}
    return [tried[count][0].block], figures


def _most_within(tolerated: float, limit: int, rise: Callable[[int], float]) -> int:
    """Return the largest number of layers up to ``limit`` whose rise is tolerated, by bisection; 0 for none.

    The rise is assumed to grow with the number of layers.
    """
    within, beyond = 0, limit + 1
    while beyond - within > 1:
        middle = (within + beyond + 1) // 2
        if rise(middle) <= tolerated:
            within = middle
        else:
            beyond = middle
    return within
