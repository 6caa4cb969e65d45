"""What a result gains over plain removal, which takes layers out and puts nothing in their place.

Both shortened models read text that the dense model writes, which nothing was fitted on and which needs no data. With little or
narrow calibration text, a fit can be worse than none on all other text; this shows it. What counts is the mean KL divergence of
the next token's distribution from the dense model's.

Plain removal takes as many layers as the result lacks, in one block: the best of several for this very text, so that it is a
strict reference.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from torch import Tensor

from replaceme.base.documents import Documents
from replaceme.base.plan import group_adjacent
from replaceme.calibration.own_text import write_texts
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import unfused
from replaceme.evaluation.perplexity import score_windows
from replaceme.evaluation.windows import Windows
from replaceme.models.context import ModelContext
from replaceme.models.kv_cache import eager_attention_where_faster
from replaceme.selection.blocks import smallest_of_each

TITLE = "plain removal"
# How much the dense model writes; and of each ranking, the cuts that are measured.
DOCUMENTS, LENGTH, CUTS = 32, 128, 2


@dataclass(frozen=True)
class Comparison:
    """A result beside plain removal.

    Attributes:
        result, plain: ``kl`` (nats a token) from the dense model, and ``perplexity_ratio`` over the dense model's.
        stderr: standard error of the difference of both KL divergences, over the documents.
        removed_layers: those that plain removal takes.
        tokens: how many were predicted.
    """

    result: dict[str, float]
    plain: dict[str, float]
    stderr: float
    removed_layers: Sequence[int]
    tokens: int

    @property
    def favours_plain(self) -> bool:
        """Whether plain removal is nearer to the dense model, by more than one standard error."""
        return self.result["kl"] - self.plain["kl"] > self.stderr

    def figures(self) -> dict[str, Any]:
        """Return the content of metrics/check.json, without what is exported."""
        plain = {**self.plain, "first_layer": self.removed_layers[0], "last_layer": self.removed_layers[-1]}
        return {"tokens": self.tokens, **self.result, "stderr_kl_difference": self.stderr, "plain_removal": plain}


def plain_cuts(rankings: Iterable[list[list[float]]], starts: range, own: Sequence[int]) -> list[list[int]]:
    """Return the layers of the cuts to measure: the result's own, if it is one block, and of each ranking the best.

    Args:
        rankings: values (layer before the cut × last removed layer) each; small ones are good.
        starts: the allowed starts of a block.
        own: the layers that the result lacks.
    """
    whole = [block for block in group_adjacent(own) if len(block) == len(own)]
    blocks = dict.fromkeys([*whole, *smallest_of_each(rankings, starts, len(own), CUTS)])
    return [[*block.layers] for block in blocks]


def compare_with_plain_removal(context: ModelContext, edits: Edits, cuts: Sequence[Sequence[int]]) -> Comparison:
    """Measure edits and the plain removal of several cuts on one text.

    Args:
        context: the dense model, and the text, whose documents have two tokens or more.
        edits: the result's.
        cuts: the layers of each cut.
    """
    ids = context.documents.documents
    windows = Windows(ids, [*range(len(ids))], sum(map(len, ids)), 0, 0)
    weights = windows.counts / windows.counts.sum()

    def score(description: str, edits: Edits, **options: Any) -> dict[str, Tensor]:
        with unfused(context.model, context.family, edits):
            return score_windows(context.model, windows, 1, description, **options)

    dense = score("dense model", Edits("", []), keep_likely=True)

    def summarize(scores: dict[str, Tensor]) -> dict[str, float]:
        rise = float(weights @ (scores["losses"] - dense["losses"]))
        return {"kl": float(weights @ scores["divergences"]), "perplexity_ratio": exp(min(rise, 700))}

    result = score("result", edits, dense=dense)
    plain = [
        score(f"plain removal, cut {number} of {len(cuts)}", Edits("", [*cut]), dense=dense)
        for number, cut in enumerate(cuts, 1)
    ]
    best = min(range(len(cuts)), key=lambda number: float(weights @ plain[number]["divergences"]))
    differences = result["divergences"] - plain[best]["divergences"]
    stderr = float(differences.std() / len(differences) ** 0.5)
    return Comparison(summarize(result), summarize(plain[best]), stderr, cuts[best], int(windows.counts.sum()))


def write_own_text(context: ModelContext, tokenizer: Any, length: int, seed: int) -> Documents:
    """Return text that the dense model writes, ``DOCUMENTS`` documents of ``LENGTH`` tokens, or ``length`` if that is less."""
    with eager_attention_where_faster(context.model, context.family):
        return Documents(write_texts(context.model, tokenizer, DOCUMENTS, min(length, LENGTH), seed))
