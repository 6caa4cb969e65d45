"""Calibration documents as token ids, right-padded batches of them, and samples of them.

On disk, ``documents.safetensors`` holds the concatenated ids (int32) and the length of each document (int64), without padding;
and the source of each document (int64), where it is not its position in the list.
In a batch, padding comes after the text, so a causal model's real tokens never attend to it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.base.accelerators import to_device
from replaceme.base.files import missing_output
from replaceme.base.group import WHOLE, Shard

FILE = "documents.safetensors"
# The folder, within the final edits, of the text that a healing was trained on.
TEXT = "text"


@dataclass
class Batch:
    """Documents for one forward pass.

    Attributes:
        input_ids: (documents, longest) int64, padded at the right with 0.
        lengths: (documents,) int64, the number of real tokens of each document; on the processor, which never has to wait for
            an accelerator to know them.
        first_token: the number of real tokens before this batch in this process's part of the walk.
        position: the same in the whole walk, which several processes can share.
        scratch: tensors that observers keep from one layer of this batch for a later one.
    """

    input_ids: Tensor
    lengths: Tensor
    first_token: int
    position: int
    scratch: MutableMapping[object, Tensor] = field(default_factory=dict)

    @cached_property
    def indices(self) -> Tensor:
        """(tokens,) int64: where the real tokens are among all of ``input_ids``, row by row."""
        mask = torch.arange(self.input_ids.shape[1]) < self.lengths[:, None]
        return to_device(mask.flatten().nonzero()[:, 0], self.input_ids.device)

    @cached_property
    def last_indices(self) -> Tensor:
        """(documents,) int64: where each document's last real token is among all of ``input_ids``, row by row."""
        starts = torch.arange(len(self.lengths)) * self.input_ids.shape[1]
        return to_device(starts + self.lengths - 1, self.input_ids.device)

    @cached_property
    def token_count(self) -> int:
        """Number of real tokens."""
        return int(self.lengths.sum())

    @property
    def tokens(self) -> slice:
        """Positions of this batch's real tokens among those of this process's part of the walk."""
        return slice(self.first_token, self.first_token + self.token_count)

    @property
    def positions(self) -> slice:
        """Positions of this batch's real tokens among all real tokens of the walk."""
        return slice(self.position, self.position + self.token_count)

    def real(self, states: Tensor) -> Tensor:
        """Return the real tokens of ``states`` (documents, longest, width) as (tokens, width)."""
        rows = states.flatten(0, 1)
        return rows if self.token_count == len(rows) else rows.index_select(0, self.indices.to(states.device))

    def padded(self, rows: Tensor) -> Tensor:
        """Return ``rows`` (tokens, width) as (documents, longest, width), zero at padding: the inverse of ``real``."""
        states = rows.new_zeros(*self.input_ids.shape, rows.shape[-1])
        states.flatten(0, 1).index_copy_(0, self.indices.to(rows.device), rows)
        return states

    def last(self, states: Tensor) -> Tensor:
        """Return each document's last real token of ``states`` as (documents, width)."""
        return states.flatten(0, 1).index_select(0, self.last_indices)


class Documents:
    """Token ids of a list of texts, each (tokens,) int64.

    Attributes:
        documents: the token ids.
        sources: a number for each document; pieces of one text have the same. Without it, each document is its own source.
    """

    def __init__(self, documents: list[Tensor], sources: Sequence[int] | None = None):
        self.documents = documents
        self.sources = [*range(len(documents))] if sources is None else [*sources]

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def domains(self) -> list[int]:
        """The domain of each document: the entry of ``dataset`` that it is from."""
        return [source >> SOURCE_BITS for source in self.sources]

    @property
    def tokens_by_domain(self) -> dict[int, int]:
        """The number of tokens of each domain."""
        counts: Counter[int] = Counter()
        for domain, document in zip(self.domains, self.documents, strict=True):
            counts[domain] += len(document)
        return counts

    @property
    def token_count(self) -> int:
        """Number of tokens of all documents."""
        return sum(len(document) for document in self.documents)

    def head(self, count: int, max_length: int) -> "Documents":
        """Return the first ``count`` documents, cut to ``max_length`` tokens."""
        return Documents([document[:max_length] for document in self.documents[:count]], self.sources[:count])

    def shuffled(self, seed: int) -> "Documents":
        """Return the documents in a seeded order."""
        return self.taken(seeded_order(len(self), seed).tolist())

    def in_walk_order(self) -> "Documents":
        """Return the documents in the order of a walk: longest first."""
        return self.taken(sorted(range(len(self)), key=lambda index: len(self.documents[index]), reverse=True))

    def taken(self, indices: Sequence[int]) -> "Documents":
        """Return the documents with these indices, in their order."""
        return Documents([self.documents[index] for index in indices], [self.sources[index] for index in indices])

    def batch_count(self, batch_size: int, shard: Shard) -> int:
        """Return the number of batches that ``batches`` yields."""
        return sum(map(shard.owns, range(-(-len(self) // batch_size))))

    def token_count_of(self, batch_size: int, shard: Shard) -> int:
        """Return the number of tokens of the batches that ``batches`` yields."""
        lengths = [len(document) for document in self.in_walk_order().documents]
        return sum(length for index, length in enumerate(lengths) if shard.owns(index // batch_size))

    def batches(self, batch_size: int, device: str = "cpu", shard: Shard = WHOLE) -> Iterator[Batch]:
        """Yield all documents in batches, longest first, so that a batch has little padding; or a process's part of these."""
        ordered = self.in_walk_order().documents
        first_token = position = 0
        for number, start in enumerate(range(0, len(ordered), batch_size)):
            chosen = ordered[start : start + batch_size]
            lengths = torch.tensor([len(document) for document in chosen])
            if shard.owns(number):
                input_ids = torch.nn.utils.rnn.pad_sequence([document.long() for document in chosen], batch_first=True)
                yield Batch(to_device(input_ids, device), lengths, first_token, position)
                first_token += int(lengths.sum())
            position += int(lengths.sum())

    def save(self, folder: Path) -> None:
        """Write the documents into ``folder``."""
        lengths = torch.tensor([len(document) for document in self.documents])
        tensors = {"input_ids": torch.cat(self.documents).to(torch.int32), "lengths": lengths}
        if self.sources != [*range(len(self))]:
            tensors["sources"] = torch.tensor(self.sources)
        save_file(tensors, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> "Documents":
        """Read what ``save`` wrote."""
        try:
            stored = load_file(folder / FILE)
        except FileNotFoundError:
            raise missing_output(folder / FILE) from None
        # Copies: a view of all of them would be copied with all of them.
        documents = [document.clone() for document in stored["input_ids"].long().split(stored["lengths"].tolist())]
        return cls(documents, stored["sources"].tolist() if "sources" in stored else None)


# Tokens that many trials are measured on, tokens of a document at most, and the seed of the documents' order.
EXCERPT_TOKENS, EXCERPT_LENGTH, EXCERPT_SEED = 4096, 1024, 0


def excerpts_of(documents: Documents, tokens: int | None = None) -> Documents:
    """Return so many tokens of documents (None: ``EXCERPT_TOKENS``) in a seeded order, at most ``EXCERPT_LENGTH`` of each.

    The next document is always one of the domain that lacks most of its share of the tokens, so that each domain is there.
    """
    tokens = EXCERPT_TOKENS if tokens is None else tokens
    excerpts: list[Tensor] = []
    sources: list[int] = []
    for source, document in _by_domain(documents.shuffled(EXCERPT_SEED)):
        # A single token predicts none.
        if tokens < 2:
            break
        if len(document) > 1:
            excerpts.append(document[: min(EXCERPT_LENGTH, tokens)])
            sources.append(source)
            tokens -= len(excerpts[-1])
    return Documents(excerpts, sources)


def part_of(documents: Documents, tokens: int) -> Documents:
    """Return whole documents that reach so many tokens, each domain at its share, in a seeded order; or all as they are."""
    if documents.token_count <= tokens:
        return documents
    return first_documents(_by_domain(documents.shuffled(EXCERPT_SEED)), tokens)


def _by_domain(documents: Documents) -> Iterator[tuple[int, Tensor]]:
    """Yield the documents with their sources, the domains at their shares of the tokens from the first one on."""
    domains: dict[int, list[tuple[int, Tensor]]] = {}
    for domain, source, document in zip(documents.domains, documents.sources, documents.documents, strict=True):
        domains.setdefault(domain, []).append((source, document))
    for _, source, document in in_shares({domain: iter(own) for domain, own in domains.items()}, documents.tokens_by_domain):
        yield source, document


def in_shares(
    streams: Mapping[int, Iterator[tuple[int, Tensor]]], shares: Mapping[int, float] | Sequence[float]
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the documents of all streams: always the next one of the stream that lacks most of its share of the tokens so far.

    Args:
        streams: by number, each with the source and the token ids, (tokens,), of its documents.
        shares: of the tokens, relative to each other, by the same numbers.

    Yields:
        The stream's number, the source and the document.
    """
    left, passed = dict(streams), dict.fromkeys(streams, 0)
    while left:
        number = min(left, key=lambda number: passed[number] / shares[number])
        source, document = next(left[number], (0, None))
        if document is None:
            del left[number]
            continue
        passed[number] += len(document)
        yield number, source, document


def few_documents(documents: Documents, tokens: int) -> Documents:
    """Return the first documents of a walk (the longest ones) that reach so many tokens together, or all."""
    ordered = documents.in_walk_order()
    return first_documents(zip(ordered.sources, ordered.documents, strict=True), tokens)


def first_documents(documents: Iterable[tuple[int, Tensor]], tokens: int) -> Documents:
    """Return the first of these sources and documents that reach so many tokens together, or all."""
    chosen: list[tuple[int, Tensor]] = []
    for source, document in documents:
        if tokens <= 0:
            break
        chosen.append((source, document))
        tokens -= len(document)
    return Documents([document for _, document in chosen], [source for source, _ in chosen])


def seeded_order(count: int, seed: int) -> Tensor:
    """Return a random permutation of ``range(count)``, (count,) int64, which the seed determines."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# About one document of this many is held out.
HELD_OUT_EVERY = 5


def split_documents(documents: Documents) -> tuple[Documents, Documents]:
    """Return the documents to fit on, and those held out (``split_indices``), in the order of a walk."""
    ordered = documents.in_walk_order()
    fit, held_out = split_indices(ordered.sources, HELD_OUT_EVERY)
    return ordered.taken(fit), ordered.taken(held_out)


# Folds of a text for choices, at most; and the bits of a source's number below its domain's (``replaceme.calibration.draw``).
FOLDS, SOURCE_BITS = 4, 32


def folds_of(documents: Documents, most: int = FOLDS) -> Tensor:
    """Return the fold of each token of a walk, (tokens,) int64: at most ``most`` folds of nearly as many tokens each.

    A fold is whole sources, or whole documents if all have one source; each domain is spread over the folds.
    """
    ordered = documents.in_walk_order()
    units = ordered.sources if len(set(ordered.sources)) > 1 else [*range(len(ordered))]
    sizes: Counter[int] = Counter()
    for unit, document in zip(units, ordered.documents, strict=True):
        sizes[unit] += len(document)
    filled = [0] * max(min(most, len(sizes)), 1)
    fold: dict[int, int] = {}
    for unit in sorted(sizes, key=lambda unit: unit >> SOURCE_BITS):
        fold[unit] = filled.index(min(filled))
        filled[fold[unit]] += sizes[unit]
    lengths = torch.tensor([len(document) for document in ordered.documents])
    return torch.tensor([fold[unit] for unit in units]).repeat_interleave(lengths)


def split_indices(sources: Sequence[int], every: int) -> tuple[list[int], list[int]]:
    """Return the documents of a walk that are used, and those that are held out, by their indices: whole sources.

    A piece of a text tells much about the text's other pieces, so that these must not be fitted on if it is held out. At most
    one of ``every`` documents is held out; of each domain its quota, by largest remainders. Within a domain, a source is held
    out where this leaves no more than that of the documents so far: of one domain with a source for each document, the last of
    each ``every`` ones. If it holds for no source, the smallest one is held out.

    Args:
        sources: the source of each document, in the order of the walk.
        every: no document is held out of fewer than these, or if all have one source.
    """
    sizes, counts = Counter(sources), Counter(source >> SOURCE_BITS for source in sources)
    quotas = {domain: count // every for domain, count in counts.items()}
    left = len(sources) // every - sum(quotas.values())
    for domain in sorted(counts, key=lambda domain: -(counts[domain] % every))[:left]:
        quotas[domain] += 1
    # A domain whose quota was rounded up begins with so many documents passed that it reaches it.
    passed = {domain: max(every * quotas[domain] - count, 0) for domain, count in counts.items()}
    held = dict.fromkeys(counts, 0)
    chosen: set[int] = set()
    for source, size in sizes.items():
        domain = source >> SOURCE_BITS
        passed[domain] += size
        if (held[domain] + size) * every <= passed[domain]:
            chosen.add(source)
            held[domain] += size
    if not chosen and len(sizes) > 1 and len(sources) >= every:
        chosen.add(min(sizes, key=sizes.__getitem__))
    held_out = [index for index, source in enumerate(sources) if source in chosen]
    return [index for index, source in enumerate(sources) if source not in chosen], held_out
