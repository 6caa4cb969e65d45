"""Perplexity on windows of running text, and the divergence of a pruned model's predictions from the dense model's.

With ``nll``, the mean negative log-likelihood of predicted tokens, token perplexity is ``exp(nll)``; word and byte perplexity
are ``exp(nll · tokens / words)`` and ``exp(nll · tokens / bytes)`` over the same text, so that models with different tokenizers
can be compared. The standard error is clustered by text (``replaceme.evaluation.standard_errors``).
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from replaceme.base.accelerators import to_device, to_float64
from replaceme.base.group import all_reduce_sum, shard
from replaceme.base.progress import progress
from replaceme.evaluation.windows import WINDOW, Windows
from replaceme.models.interleaving import interleave_forwards

# The dense model's most likely tokens that are kept at each position.
TOP = 64
MAX_EXPONENT = 700.0
# Positions whose log-probabilities are computed at once: over a vocabulary of 49k, 12 MB, which a processor's cache holds.
POSITIONS = 64


@torch.inference_mode()
def score_windows(
    model: Any,
    windows: Windows,
    batch_size: int,
    description: str,
    dense: Mapping[str, Tensor] | None = None,
    *,
    keep_likely: bool = False,
) -> dict[str, Tensor]:
    """Score a model on windows; processes share the batches, and each gets all scores.

    Args:
        model: the model.
        windows: what to score.
        batch_size: full windows in a batch; of shorter ones, as many as have no more tokens.
        description: of the progress bar.
        dense: ``likely_ids`` and ``likely_logs`` of the dense model, if this is another one.
        keep_likely: whether this is the dense model, from which others will differ.

    Returns:
        ``losses`` (windows,) float64: each window's mean negative log-likelihood, in nats a token. With ``keep_likely``,
        ``likely_ids`` (predictions, ``TOP``) int32 and ``likely_logs`` float32: the most likely tokens at each position of all
        windows, and their log-probabilities. With ``dense``, ``divergences`` and ``agreements`` (windows,) float64: each
        window's mean KL divergence from the dense model, in nats a token, and its part of positions where both models' most
        likely token is the same.
    """
    order = sorted(range(len(windows.ids)), key=lambda index: len(windows.ids[index]), reverse=True)
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * len(windows.ids[batches[-1][0]]) > batch_size * WINDOW:
            batches.append([])
        batches[-1].append(index)
    batches = batches[shard().rank :: shard().size]
    # What other processes score stays zero here.
    names = ("losses", "divergences", "agreements") if dense else ("losses",)
    scores = {name: torch.zeros(len(order), dtype=torch.float64) for name in names}
    if keep_likely:
        predictions = int(windows.counts.sum())
        scores["likely_ids"] = torch.zeros(predictions, TOP, dtype=torch.int32)
        scores["likely_logs"] = torch.zeros(predictions, TOP)
    passes = interleave_forwards(model, (partial(_score_batch, model, windows, batch, dense, scores) for batch in batches))
    for _ in progress(passes, description, "batches", len(batches)):
        pass
    for name in names:
        scores[name] /= windows.counts
    all_reduce_sum(scores)
    return scores


def _score_batch(
    model: Any, windows: Windows, batch: list[int], dense: Mapping[str, Tensor] | None, scores: Mapping[str, Tensor]
) -> None:
    """Add to ``scores``, as of ``score_windows``, those of the windows with these indices; sums instead of means."""
    bounds = [0, *windows.counts.long().cumsum(0).tolist()]
    rows = [windows.ids[index] for index in batch]
    # The last token predicts nothing, so it is left out.
    ids = to_device(torch.nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True), model.device)
    # Sums of parts of the windows, read all at once: each reading of a device waits for it.
    sums: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for index, row, logits in zip(batch, rows, model(ids, use_cache=False).logits, strict=True):
        count, row, likely = len(row) - 1, to_device(row, logits.device), list[Any]()
        for start in range(0, count, POSITIONS):
            end = min(start + POSITIONS, count)
            logs = log_softmax(logits[start:end].float(), dim=-1)
            sums["losses"].append((index, nll_loss(logs, row[start + 1 : end + 1], reduction="sum")))
            positions = slice(bounds[index] + start, bounds[index] + end)
            if "likely_ids" in scores:
                likely.append(logs.topk(TOP))
            if dense:
                p_logs, known = (to_device(dense[name][positions], logs.device) for name in ("likely_logs", "likely_ids"))
                q_logs = logs.gather(1, known.long())
                sums["divergences"].append((index, kl_divergence(p_logs, q_logs).sum()))
                # Predictions of few bits tie: the dense model's most likely token counts as the same if none is more likely.
                sums["agreements"].append((index, (q_logs[:, 0] == logs.amax(-1)).sum()))
        if likely:
            whole = slice(bounds[index], bounds[index] + count)
            scores["likely_logs"][whole], scores["likely_ids"][whole] = map(torch.cat, zip(*likely, strict=True))
    for name, parts in sums.items():
        for (index, _), value in zip(parts, torch.stack([part for _, part in parts]).tolist(), strict=True):
            scores[name][index] += value


def kl_divergence(p_logs: Tensor, q_logs: Tensor) -> Tensor:
    """Return the KL divergence of two distributions at each position, in nats, with all other tokens taken as one.

    This is a lower bound of the divergence over the whole vocabulary (data processing), and zero for equal distributions.

    Args:
        p_logs: (positions, tokens) float log-probabilities of the first distribution, for its most likely tokens.
        q_logs: those of the second distribution, for the same tokens.

    Returns:
        (positions,) float64.
    """
    p_logs, q_logs = to_float64(p_logs), to_float64(q_logs)
    divergence = (p_logs.exp() * (p_logs - q_logs)).sum(-1)
    # The probability of all other tokens; rounding may leave less than nothing.
    p_rest, q_rest = ((1 - logs.exp().sum(-1)).clamp_min(1e-9) for logs in (p_logs, q_logs))
    return divergence + p_rest * (p_rest / q_rest).log()


def compute_perplexities(losses: Tensor, windows: Windows) -> dict[str, float]:
    """Return ``token``, ``word`` and ``byte`` perplexity from the windows' losses, and ``stderr`` of the token perplexity.

    A perplexity that overflows (for a text of one endless word, say) is left out.
    """
    nll = float(windows.sample.weights @ losses)
    exponents = {
        "token": nll,
        "word": nll * windows.tokens / max(windows.words, 1),
        "byte": nll * windows.tokens / max(windows.bytes, 1),
    }
    figures = {unit: math.exp(exponent) for unit, exponent in exponents.items() if exponent < MAX_EXPONENT}
    if "token" in figures and (error := windows.sample.stderr(losses)) is not None:
        figures["stderr"] = figures["token"] * error
    return figures
