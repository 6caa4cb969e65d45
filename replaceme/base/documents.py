"""Calibration documents as token ids, and the right-padded batches that a forward pass takes.

On disk: ``documents.safetensors`` holds all ids end to end (int32) and each document's length (int64); there is no
padding to store. In a batch, padding comes after the text, so a causal model's real tokens never see it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.base.errors import ResourceError

FILE = "documents.safetensors"


@dataclass
class Batch:
    """Documents side by side.

    Attributes:
        input_ids: (documents, longest) int64, padded at the right with 0.
        lengths: (documents,) int64, the number of real tokens of each.
        first_token: how many real tokens came before this batch in the walk.
        scratch: what observers keep from one layer of this batch to a later one.
    """

    input_ids: Tensor
    lengths: Tensor
    first_token: int
    scratch: dict[object, Tensor] = field(default_factory=dict)

    @property
    def mask(self) -> Tensor:
        """(documents, longest) bool: which tokens are real."""
        positions = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return positions < self.lengths[:, None]

    @property
    def token_count(self) -> int:
        """Number of real tokens."""
        return int(self.lengths.sum())

    @property
    def tokens(self) -> slice:
        """Positions of this batch's real tokens among all those of the walk."""
        return slice(self.first_token, self.first_token + self.token_count)

    def real(self, states: Tensor) -> Tensor:
        """Return the real tokens of ``states`` (documents, longest, width) as (tokens, width)."""
        if self.token_count == self.input_ids.numel():
            return states.reshape(-1, states.shape[-1])
        return states[self.mask]

    def padded(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (tokens, width) as (documents, longest, width), with zeros for padding: what ``real`` undoes."""
        states = rows.new_zeros(*self.input_ids.shape, rows.shape[-1])
        states[self.mask.to(rows.device)] = rows
        return states

    def last(self, states: Tensor) -> Tensor:
        """Return each document's last real token of ``states`` as (documents, width)."""
        rows = torch.arange(len(self.lengths), device=states.device)
        return states[rows, self.lengths - 1]


class Documents:
    """Token ids of a set of texts."""

    def __init__(self, documents: list[Tensor]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def token_count(self) -> int:
        """Number of tokens of all documents."""
        return sum(len(document) for document in self.documents)

    def head(self, count: int, max_length: int) -> "Documents":
        """Return the first ``count`` documents, cut to ``max_length`` tokens."""
        return Documents([document[:max_length] for document in self.documents[:count]])

    def longest_first(self) -> list[Tensor]:
        """Return the documents in the order of a walk."""
        return sorted(self.documents, key=len, reverse=True)

    def batch_count(self, batch_size: int) -> int:
        """Return the number of batches that ``batches`` yields."""
        return -(-len(self) // batch_size)

    def batches(self, batch_size: int, device: str = "cpu") -> Iterator[Batch]:
        """Yield all documents, longest first, so that a batch holds little padding."""
        ordered = self.longest_first()
        first_token = 0
        for start in range(0, len(ordered), batch_size):
            chosen = ordered[start : start + batch_size]
            input_ids = torch.nn.utils.rnn.pad_sequence([document.long() for document in chosen], batch_first=True)
            lengths = torch.tensor([len(document) for document in chosen])
            yield Batch(input_ids.to(device), lengths.to(device), first_token)
            first_token += int(lengths.sum())

    def save(self, folder: Path) -> None:
        """Write the documents into ``folder``."""
        lengths = torch.tensor([len(document) for document in self.documents])
        save_file({"input_ids": torch.cat(self.documents).to(torch.int32), "lengths": lengths}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "Documents":
        """Read what ``save`` wrote."""
        if not (folder / FILE).is_file():
            raise ResourceError(f"{folder / FILE} does not exist: run the calibrate stage first (`dvc repro`).")
        stored = load_file(folder / FILE)
        return cls(list(stored["input_ids"].long().split(stored["lengths"].tolist())))


# Tokens that the loss is taken on, and of a document, at most; and the seed of the order in which documents are taken.
EXCERPT_TOKENS, EXCERPT_LENGTH, EXCERPT_SEED = 4096, 1024, 0


def excerpts_of(documents: Documents) -> Documents:
    """Return documents, in a seeded order and at most ``EXCERPT_LENGTH`` tokens of each, until ``EXCERPT_TOKENS`` are
    reached."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(EXCERPT_SEED)).tolist()
    chosen: list[Tensor] = []
    left = EXCERPT_TOKENS
    for index in order:
        excerpt = documents.documents[index][: min(EXCERPT_LENGTH, left)]
        if len(excerpt) > 1:
            chosen.append(excerpt)
            left -= len(excerpt)
    return Documents(chosen)


# Every this many documents, one is held out.
HELD_OUT_EVERY = 5


def split_documents(documents: Documents) -> tuple[Documents, Documents]:
    """Return the documents to fit on, and those held out (none, of fewer than five)."""
    ordered = documents.longest_first()
    held_out = held_out_places(torch.arange(len(ordered))).tolist()
    parts = [
        Documents([document for document, out in zip(ordered, held_out, strict=True) if out is wanted])
        for wanted in (False, True)
    ]
    return parts[0], parts[1]


def held_out_places(documents: Tensor) -> Tensor:
    """Return which places in a walk are held out, (n,) bool, of places (n,) int64."""
    return documents % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def few_documents(documents: Documents, tokens: int) -> Documents:
    """Return the first documents of a walk, which are the longest, that have so many tokens together, or all."""
    chosen: list[Tensor] = []
    for document in documents.longest_first():
        if tokens <= 0:
            break
        chosen.append(document)
        tokens -= len(document)
    return Documents(chosen)
