"""Perplexity on running text, in non-overlapping windows of 1024 tokens (fewer, if the model takes fewer).

Each window starts with the tokenizer's start-of-text ids. A chat is rendered by the tokenizer's chat template, or as plain text
with the roles' names if it has none. With ``nll``, the mean negative log-likelihood of predicted tokens,
token perplexity is ``exp(nll)``; word and byte perplexity are ``exp(nll · tokens / words)`` and ``exp(nll · tokens / bytes)``
over the same text, so that models with different tokenizers can be compared. The standard error comes from the spread over the
texts, or over the windows of a single text (ratio estimate, first order).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from replaceme.base.errors import DatasetError
from replaceme.base.group import all_reduce_sum, shard
from replaceme.base.progress import progress
from replaceme.corpora.corpus import Row, plain_text
from replaceme.corpora.tokenization import encode, encode_in_chunks, start_of_text
from replaceme.models.interleaving import interleave_forwards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 1024
# A standard error over fewer texts would be far too small most of the time.
FEWEST_TEXTS = 5
# The dense model's most likely tokens that are kept at each position.
TOP = 64
LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, and the tokens, words and bytes of their text (without start-of-text ids).

    ``texts`` numbers the text of each window; it is empty if no text has several, or all are of one text.
    """

    windows: list[Tensor]
    tokens: int
    words: int
    bytes: int
    texts: tuple[int, ...] = ()

    def predictions(self) -> Tensor:
        """Return (windows,) float64: the number of predicted tokens of each window."""
        return torch.tensor([len(window) - 1 for window in self.windows], dtype=torch.float64)

    def text_numbers(self) -> Tensor | None:
        """Return (windows,) int64: the number of each window's text; None if the windows are the sample."""
        return torch.tensor(self.texts) if self.texts else None


def cut_windows(
    task: str, texts: Iterable[Row], tokenizer: PreTrainedTokenizerBase, limit: int | None, positions: int | None = None
) -> Windows:
    """Cut texts into windows: the first of each text, then the second of each, and so on.

    Args:
        task: name of the text in messages.
        texts: running texts or chats; no window spans two of them.
        tokenizer: the model's tokenizer.
        limit: largest number of text tokens; None takes all.
        positions: largest number of tokens that the model takes, if its config says.

    Raises:
        DatasetError: there is no token to predict.
    """
    prefix = start_of_text(tokenizer)
    room = min(WINDOW, positions or WINDOW) - len(prefix)
    encoded = [_ids(text, tokenizer, prefix, limit) for text in texts]
    windows: list[Tensor] = []
    texts_of: list[int] = []
    taken = [0] * len(encoded)  # ids taken from the beginning of each text
    left = math.inf if limit is None else limit
    for start in range(0, max(map(len, encoded), default=0), room):
        for number, ids in enumerate(encoded):
            body = ids[start : start + int(min(room, left))]
            if body and len(prefix) + len(body) >= 2:  # a single token has no prediction
                windows.append(torch.tensor([*prefix, *body]))
                texts_of.append(number)
                taken[number] += len(body)
                left -= len(body)
    if not windows:
        raise DatasetError(f"tasks: {task} has no text after tokenization.")
    decoded = [tokenizer.decode(ids[:count]) for ids, count in zip(encoded, taken, strict=True)]
    words, size = sum(len(text.split()) for text in decoded), sum(len(text.encode()) for text in decoded)
    shared = 1 < len(set(texts_of)) < len(texts_of)
    return Windows(windows, sum(taken), words, size, tuple(texts_of) if shared else ())


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
    """Score a model on windows, in their order; processes share the batches, and each gets all scores.

    Args:
        model: the model.
        windows: what to score.
        batch_size: windows in a batch.
        description: of the progress bar.
        dense: what this function returned for the dense model, if this is another one.
        keep_likely: whether this is the dense model, from which others will differ.

    Returns:
        ``losses`` (windows,) float64: each window's sum of negative log-likelihoods in nats. With ``keep_likely``,
        ``likely_ids`` (predictions, ``TOP``) int32 and ``likely_logs`` float32: the most likely tokens at each position of all
        windows, and their log-probabilities. With ``dense``, ``divergences`` and ``agreements`` (windows,) float64: each
        window's sum over positions of the KL divergence from the dense model, in nats, and the number of positions with the
        dense model's most likely token.
    """
    order = sorted(range(len(windows.windows)), key=lambda index: len(windows.windows[index]), reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = batches[shard().rank :: shard().size]
    losses, divergences, agreements = torch.zeros(3, len(order), dtype=torch.float64)
    bounds = [0, *windows.predictions().long().cumsum(0).tolist()]
    likely: dict[int, tuple[Tensor, Tensor]] = {}

    def score(batch: list[int]) -> None:
        rows = [windows.windows[index] for index in batch]
        # The last token predicts nothing, so it is left out.
        ids = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True).to(model.device)
        logits = model(ids, use_cache=False).logits
        for index, row, scores in zip(batch, rows, logits, strict=True):
            logs = log_softmax(scores[: len(row) - 1].float(), dim=-1)
            losses[index] = float(nll_loss(logs, row[1:].to(logs.device), reduction="sum"))
            if keep_likely:
                values, places = logs.topk(min(TOP, logs.shape[-1]))
                likely[index] = places.int().cpu(), values.cpu()
            if dense is not None:
                own = slice(bounds[index], bounds[index + 1])
                places, values = (dense[name][own].to(logs.device) for name in ("likely_ids", "likely_logs"))
                divergences[index] = float(divergence(values, logs.gather(1, places.long())).sum())
                # Predictions of few bits tie: the dense model's most likely token counts as the same if none is more likely.
                agreements[index] = int((logs.gather(1, places[:, :1].long())[:, 0] == logs.max(-1).values).sum())

    passes = interleave_forwards(model, (partial(score, batch) for batch in batches))
    for _ in progress(passes, description, "batches", len(batches)):
        pass
    scores = {"losses": losses}
    if dense is not None:
        scores |= {"divergences": divergences, "agreements": agreements}
    if likely:
        width = len(next(iter(likely.values()))[0][0])
        scores["likely_ids"] = torch.zeros(bounds[-1], width, dtype=torch.int32)
        scores["likely_logs"] = torch.zeros(bounds[-1], width)
    for index, (places, values) in likely.items():
        own = slice(bounds[index], bounds[index + 1])
        scores["likely_ids"][own], scores["likely_logs"][own] = places, values
    # What other processes have scored is zero here.
    all_reduce_sum(scores)
    return scores


def divergence(p_logs: Tensor, q_logs: Tensor) -> Tensor:
    """Return the KL divergence of two distributions at each position, in nats, with all other tokens taken as one.

    This is a lower bound of the divergence over the whole vocabulary (data processing), and zero for equal distributions.

    Args:
        p_logs: (positions, tokens) float log-probabilities of the first distribution, for its most likely tokens.
        q_logs: those of the second distribution, for the same tokens.

    Returns:
        (positions,) float64.
    """
    p_logs, q_logs = p_logs.double(), q_logs.double()
    known = (p_logs.exp() * (p_logs - q_logs)).sum(-1)
    # The probability of all other tokens; rounding may leave less than nothing.
    p_rest, q_rest = ((1 - logs.exp().sum(-1)).clamp_min(1e-9) for logs in (p_logs, q_logs))
    return known + p_rest * (p_rest / q_rest).log()


def perplexities(losses: Tensor, windows: Windows) -> dict[str, float]:
    """Return ``token``, ``word`` and ``byte`` perplexity from the windows' losses, and ``stderr`` of the token perplexity.

    A perplexity that overflows (for a text of one endless word, say) is left out.
    """
    counts = windows.predictions()
    nll = float(losses.sum() / counts.sum())
    exponents = {
        "token": nll,
        "word": nll * windows.tokens / max(windows.words, 1),
        "byte": nll * windows.tokens / max(windows.bytes, 1),
    }
    figures = {unit: math.exp(exponent) for unit, exponent in exponents.items() if exponent < LARGEST_EXPONENT}
    if "token" in figures and (error := mean_stderr(losses, counts, windows.text_numbers())) is not None:
        figures["stderr"] = figures["token"] * error
    return figures


def mean_stderr(sums: Tensor, counts: Tensor, texts: Tensor | None = None) -> float | None:
    """Return the standard error of ``sums.sum() / counts.sum()`` (ratio estimate, first order).

    None for a single window, or windows of fewer than ``FEWEST_TEXTS`` texts.

    Args:
        sums: (windows,) float64.
        counts: (windows,) float64.
        texts: (windows,) int64, the text of each window; None takes the windows as independent.
    """
    if texts is not None:
        _, place = texts.unique(return_inverse=True)
        size = int(place.max()) + 1
        if size < FEWEST_TEXTS:
            return None
        sums, counts = (torch.zeros(size, dtype=each.dtype).index_add_(0, place, each) for each in (sums, counts))
    if len(sums) < 2:
        return None
    spread = (sums - sums.sum() / counts.sum() * counts).square().sum()
    return math.sqrt(float(spread) * len(sums) / (len(sums) - 1)) / float(counts.sum())


def _ids(row: Row, tokenizer: PreTrainedTokenizerBase, prefix: list[int], limit: int | None) -> list[int]:
    if not isinstance(row, str):
        if tokenizer.chat_template:
            return encode(row, tokenizer, prefix)
        row = plain_text(row)
    ids: list[int] = []
    for chunk in encode_in_chunks(row, tokenizer, prefix):
        ids += chunk
        if limit is not None and len(ids) >= limit:
            break
    return ids
