"""Perplexity on running text, in non-overlapping windows of 1024 tokens.

Each window starts as the tokenizer starts a text. With mean negative log-likelihood ``nll`` over the predicted tokens:
token perplexity is ``exp(nll)``; word and byte perplexity are ``exp(nll · tokens / words)`` and ``exp(nll · tokens /
bytes)`` over the same text, so that models with different tokenizers compare. The standard error comes from the spread of
the windows' means (a ratio estimate, first order).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from replaceme.errors import DatasetError
from replaceme.progress import progress
from replaceme.tokenization import encode_in_chunks, start_of_text

WINDOW = 1024
LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Windows:
    """Windows of a text, and how much text they hold (start-of-text ids not counted)."""

    windows: list[Tensor]
    tokens: int
    words: int
    bytes: int


def cut_windows(task: str, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int | None) -> Windows:
    """Cut texts into windows, the first of each text, then the second of each, and so on.

    Args:
        task: what to call the text in messages.
        texts: running texts; windows never span two of them.
        tokenizer: the model's.
        limit: text tokens to take at most; None takes all.

    Raises:
        DatasetError: there is nothing to predict.
    """
    prefix = start_of_text(tokenizer)
    room = WINDOW - len(prefix)
    encoded = [_ids(text, tokenizer, prefix, limit) for text in texts]
    windows: list[Tensor] = []
    taken = [0] * len(encoded)  # ids of each text, from its beginning
    left = math.inf if limit is None else limit
    for start in range(0, max(map(len, encoded), default=0), room):
        for number, ids in enumerate(encoded):
            body = ids[start : start + int(min(room, left))]
            if body and len(prefix) + len(body) >= 2:  # a single token has no prediction
                windows.append(torch.tensor([*prefix, *body]))
                taken[number] += len(body)
                left -= len(body)
    if not windows:
        raise DatasetError(f"tasks: {task} has no text after tokenization.")
    decoded = [tokenizer.decode(ids[:count]) for ids, count in zip(encoded, taken, strict=True)]
    return Windows(
        windows, sum(taken), sum(len(text.split()) for text in decoded), sum(len(text.encode()) for text in decoded)
    )  # fmt: skip


@torch.inference_mode()
def perplexities(model: Any, windows: Windows, batch_size: int, description: str) -> dict[str, float]:
    """Return ``token``, ``word`` and ``byte`` perplexity of a model on windows, and ``stderr`` of the first.

    A figure that overflows (a text of one endless word, say) is left out.
    """
    ordered = sorted(windows.windows, key=len, reverse=True)
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    losses: list[float] = []
    for batch in progress(batches, description, "batches"):
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
        targets = torch.nn.utils.rnn.pad_sequence([window[1:] for window in batch], batch_first=True, padding_value=-100)
        logits = model(ids, use_cache=False).logits[:, :-1]
        for row, target in zip(logits, targets.to(model.device), strict=True):
            losses.append(float(cross_entropy(row.float(), target, ignore_index=-100, reduction="sum")))
    counts = [len(window) - 1 for window in ordered]
    nll = sum(losses) / sum(counts)
    exponents = {
        "token": nll,
        "word": nll * windows.tokens / max(windows.words, 1),
        "byte": nll * windows.tokens / max(windows.bytes, 1),
    }
    figures = {unit: math.exp(exponent) for unit, exponent in exponents.items() if exponent < LARGEST_EXPONENT}
    if len(losses) > 1 and "token" in figures:
        spread = sum((loss - nll * count) ** 2 for loss, count in zip(losses, counts, strict=True))
        figures["stderr"] = figures["token"] * math.sqrt(spread * len(losses) / (len(losses) - 1)) / sum(counts)
    return figures


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, prefix: list[int], limit: int | None) -> list[int]:
    ids: list[int] = []
    for chunk in encode_in_chunks(text, tokenizer, prefix):
        ids += chunk
        if limit is not None and len(ids) >= limit:
            break
    return ids
