"""The windows of a running text that are scored: without overlap, of 1024 tokens (fewer, if the model takes fewer).

Each window starts with the tokenizer's start-of-text ids. A chat is rendered by the tokenizer's chat template, or as plain text
with the roles' names if it has none. The dense model's windows are kept, so that every pruned model scores the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from replaceme.base.errors import DatasetError
from replaceme.calibration.corpus import Row, plain_text
from replaceme.calibration.tokenization import encode, encode_in_chunks, start_of_text
from replaceme.evaluation.standard_errors import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 1024
# A standard error over fewer texts would be far too small most of the time.
MIN_TEXTS = 5


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, and the size of their text.

    Attributes:
        ids: (tokens,) int64 each, with the start-of-text ids.
        texts: the number of each window's text.
        tokens, words, bytes: of their text, without start-of-text ids.
    """

    ids: list[Tensor]
    texts: list[int]
    tokens: int
    words: int
    bytes: int

    @property
    def counts(self) -> Tensor:
        """(windows,) float64: the number of predicted tokens of each window."""
        return torch.tensor([len(ids) - 1 for ids in self.ids], dtype=torch.float64)

    @property
    def sample(self) -> Sample:
        """The windows as a sample of texts; of a single text, or if each has its own, they are the sample."""
        texts = torch.tensor(self.texts)
        if (count := len(texts.unique())) in (1, len(texts)):
            texts = torch.full_like(texts, -1)
        elif count < MIN_TEXTS:
            texts = torch.zeros_like(texts)
        return Sample(self.counts / self.counts.sum(), torch.zeros_like(texts), texts)

    def tensors(self, task: str) -> dict[str, Tensor]:
        """Return what ``load`` reads, and the sample."""
        layout = torch.tensor([self.texts, [len(ids) for ids in self.ids]])
        sizes = torch.tensor([self.tokens, self.words, self.bytes])
        windows = {f"ids/{task}": torch.cat(self.ids), f"layout/{task}": layout, f"sizes/{task}": sizes}
        return windows | self.sample.tensors(task)

    @classmethod
    def load(cls, items: Mapping[str, Tensor], task: str) -> Windows:
        """Return the windows of a task from ``Scores.items``."""
        texts, lengths = items[f"layout/{task}"].tolist()
        return cls([*items[f"ids/{task}"].split(lengths)], texts, *items[f"sizes/{task}"].tolist())


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
    capacity = min(WINDOW, positions or WINDOW) - len(prefix)
    encoded = [_encode(text, tokenizer, prefix, limit) for text in texts]
    windows: list[Tensor] = []
    numbers: list[int] = []
    scored = [0] * len(encoded)  # tokens of each text
    left = math.inf if limit is None else limit
    for start in range(0, max(map(len, encoded), default=0), capacity):
        for number, ids in enumerate(encoded):
            body = ids[start : start + int(min(capacity, left))]
            if body and len(prefix) + len(body) >= 2:  # a single token has no prediction
                windows.append(torch.tensor([*prefix, *body]))
                numbers.append(number)
                scored[number] += len(body)
                left -= len(body)
    if not windows:
        raise DatasetError(f"tasks: {task} has no text after tokenization.")
    decoded = [tokenizer.decode(ids[:count]) for ids, count in zip(encoded, scored, strict=True)]
    words, size = sum(len(text.split()) for text in decoded), sum(len(text.encode()) for text in decoded)
    return Windows(windows, numbers, sum(scored), words, size)


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase, prefix: list[int], limit: int | None) -> list[int]:
    """Return the first ``limit`` ids of a text, or a few more; all ids of a chat."""
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
