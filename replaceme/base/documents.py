"""Calibration documents as token ids, right-padded batches of them, and samples of them.

On disk, ``documents.safetensors`` holds the concatenated ids (int32) and the length of each document (int64), without padding.
In a batch, padding comes after the text, so a causal model's real tokens never attend to it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.base.errors import ResourceError

FILE = "documents.safetensors"


@dataclass
class Batch:
    """Documents for one forward pass.

    Attributes:
        input_ids: (documents, longest) int64, padded at the right with 0.
        lengths: (documents,) int64, the number of real tokens of each document.
        first_token: the number of real tokens before this batch in the walk.
        scratch: tensors that observers keep from one layer of this batch for a later one.
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
        """Positions of this batch's real tokens among all real tokens of the walk."""
        return slice(self.first_token, self.first_token + self.token_count)

    def real(self, states: Tensor) -> Tensor:
        """Return the real tokens of ``states`` (documents, longest, width) as (tokens, width)."""
        if self.token_count == self.input_ids.numel():
            return states.reshape(-1, states.shape[-1])
        return states[self.mask]

    def padded(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (tokens, width) as (documents, longest, width), zero at padding: the inverse of ``real``."""
        states = rows.new_zeros(*self.input_ids.shape, rows.shape[-1])
        states[self.mask.to(rows.device)] = rows
        return states

    def last(self, states: Tensor) -> Tensor:
        """Return each document's last real token of ``states`` as (documents, width)."""
        rows = torch.arange(len(self.lengths), device=states.device)
        return states[rows, self.lengths - 1]


class Documents:
    """Token ids of a list of texts, each (tokens,) int64."""

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

    def shuffled(self, seed: int) -> "Documents":
        """Return the documents in a seeded order."""
        return Documents([self.documents[index] for index in seeded_order(len(self), seed).tolist()])

    def longest_first(self) -> list[Tensor]:
        """Return the documents in the order of a walk: longest first."""
        return sorted(self.documents, key=len, reverse=True)

    def batch_count(self, batch_size: int) -> int:
        """Return the number of batches that ``batches`` yields."""
        return -(-len(self) // batch_size)

    def batches(self, batch_size: int, device: str = "cpu") -> Iterator[Batch]:
        """Yield all documents in batches, longest first, so that a batch has little padding."""
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


# Tokens that the loss is measured on, tokens of a document at most, and the seed of the documents' order.
EXCERPT_TOKENS, EXCERPT_LENGTH, EXCERPT_SEED = 4096, 1024, 0


def excerpts_of(documents: Documents) -> Documents:
    """Return ``EXCERPT_TOKENS`` tokens of documents in a seeded order, at most ``EXCERPT_LENGTH`` of each."""
    cut = (document[:EXCERPT_LENGTH] for document in documents.shuffled(EXCERPT_SEED).documents if len(document) > 1)
    excerpts = first_of(cut, EXCERPT_TOKENS)
    if (surplus := sum(map(len, excerpts)) - EXCERPT_TOKENS) > 0:
        excerpts[-1] = excerpts[-1][:-surplus]
    # A single token predicts none.
    return Documents([excerpt for excerpt in excerpts if len(excerpt) > 1])


def few_documents(documents: Documents, tokens: int) -> Documents:
    """Return the first documents of a walk (the longest ones) that reach so many tokens together, or all."""
    return Documents(first_of(documents.longest_first(), tokens))


def first_of(documents: Iterable[Tensor], tokens: int) -> list[Tensor]:
    """Return the first documents that reach so many tokens together, the last one whole; or all."""
    chosen: list[Tensor] = []
    for document in documents:
        if tokens <= 0:
            break
        chosen.append(document)
        tokens -= len(document)
    return chosen


def seeded_order(count: int, seed: int) -> Tensor:
    """Return a random permutation of ``range(count)``, (count,) int64, which the seed determines."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# One document of this many is held out.
HELD_OUT_EVERY = 5


def split_documents(documents: Documents) -> tuple[Documents, Documents]:
    """Return the documents to fit on, and those held out (none of fewer than ``HELD_OUT_EVERY``)."""
    ordered = documents.longest_first()
    fit, held_out = ([ordered[place] for place in places] for places in split_places(len(ordered), HELD_OUT_EVERY))
    return Documents(fit), Documents(held_out)


def split_places(count: int, every: int) -> tuple[list[int], list[int]]:
    """Return the places of a walk over ``count`` documents that are used, and those that are held out."""
    held_out = is_held_out(torch.arange(count), every)
    return (~held_out).nonzero()[:, 0].tolist(), held_out.nonzero()[:, 0].tolist()


def is_held_out(places: Tensor, every: int = HELD_OUT_EVERY) -> Tensor:
    """Return which places of a walk, (n,) int64, are held out, (n,) bool: the last of each ``every`` ones."""
    return places % every == every - 1
