"""Draw calibration documents: a seeded choice of texts, as at most ``max_length`` token ids each.

Each document starts with the tokenizer's start of text: exactly one BOS if it has one, even if a chat template adds its own.
Padding isn't stored. Rows without tokens are skipped and counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from replaceme.base.documents import Documents, seeded_order
from replaceme.base.errors import DatasetError
from replaceme.base.progress import progress
from replaceme.corpora.corpus import Corpus
from replaceme.corpora.tokenization import encode, encode_in_chunks, start_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"


@dataclass
class Counts:
    """Numbers of documents drawn and their tokens, of empty rows, and of documents cut to ``max_length``."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    cut: int = 0


def draw_documents(
    corpora: Sequence[Corpus | Documents],
    shares: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    max_length: int,
    *,
    pack: bool,
    seed: int,
) -> tuple[Documents, list[Counts]]:
    """Return ``size`` documents, or as many as the corpora have, and the counts of each corpus.

    The next document always comes from the corpus that lacks most of its share of the tokens so far, so shares are met to a
    document, unless a corpus ends early.

    Args:
        corpora: of each, the rows in the order of use; or documents that are drawn as they are.
        shares: of the tokens, relative to each other.
        tokenizer: the model's.
        size: number of documents.
        max_length: maximum tokens per document, including its BOS.
        pack: join short rows until a document is full.
        seed: for the choice among the pieces of a running text.

    Raises:
        DatasetError: nothing is left after tokenization.
    """
    counts = [Counts() for _ in corpora]
    streams = {
        number: iter(
            corpus.documents
            if isinstance(corpus, Documents)
            else _documents_of(corpus, tokenizer, size, max_length, pack=pack, seed=seed, counts=counts[number])
        )
        for number, corpus in enumerate(corpora)
    }
    drawn = list(progress(islice(_by_shares(streams, shares, counts), size), "drawing documents", "documents", total=size))
    if not drawn:
        empty = sum(count.empty for count in counts)
        raise DatasetError(f"dataset: no text is left after tokenization ({empty} rows were empty).")
    return Documents(drawn), counts


def _by_shares(streams: dict[int, Iterator[Tensor]], shares: Sequence[float], counts: Sequence[Counts]) -> Iterator[Tensor]:
    """Yield the documents of all streams, always the next one of the stream that lacks most of its share of the tokens."""
    while streams:
        number = min(streams, key=lambda number: counts[number].tokens / shares[number])
        document = next(streams[number], None)
        if document is None:
            del streams[number]
            continue
        counts[number].documents += 1
        counts[number].tokens += len(document)
        yield document


def _documents_of(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, size: int, max_length: int, *, pack: bool, seed: int, counts: Counts
) -> Iterator[Tensor]:
    """Yield the documents of a corpus that aren't empty, (tokens,) int64 each; of a running text, ``size`` at most."""
    prefix = start_of_text(tokenizer)
    room = max_length - len(prefix)
    encoded = (encode(row, tokenizer, prefix) for row in corpus.rows)
    if corpus.running:
        texts = (text for text in corpus.rows if isinstance(text, str))
        bodies: Iterable[list[int]] = _pieces((encode_in_chunks(text, tokenizer, prefix) for text in texts), room, size, seed)
    elif pack:
        bodies = _packed(encoded, tokenizer.encode(SEPARATOR, add_special_tokens=False), room, counts)
    else:
        bodies = encoded
    for body in bodies:
        if not body:
            counts.empty += 1
            continue
        counts.cut += len(body) > room
        yield torch.tensor([*prefix, *body[:room]])


def _pieces(texts: Iterable[Iterable[list[int]]], room: int, size: int, seed: int) -> Iterator[list[int]]:
    """Cut running texts into pieces of ``room`` tokens (a shorter text is one piece) and yield ``size`` in a seeded order.

    The rest of a longer text is dropped.
    """
    pieces: list[Tensor] = []
    for chunks in progress(texts, "tokenizing", "texts"):
        before, rest = len(pieces), torch.empty(0, dtype=torch.int32)
        for chunk in chunks:
            rest = torch.cat([rest, torch.tensor(chunk, dtype=torch.int32)])
            full = len(rest) // room * room
            pieces += rest[:full].split(room) if full else ()
            rest = rest[full:].clone()
        if len(pieces) == before and len(rest):
            pieces.append(rest)
    order = seeded_order(len(pieces), seed).tolist()
    yield from (pieces[index].tolist() for index in order[:size])


def _packed(rows: Iterable[list[int]], separator: list[int], room: int, counts: Counts) -> Iterator[list[int]]:
    """Join rows until a document has ``room`` tokens or more; the caller drops the excess."""
    joined: list[int] = []
    for ids in rows:
        if not ids:
            counts.empty += 1
            continue
        joined += [*(separator if joined else []), *ids]
        if len(joined) >= room:
            yield joined
            joined = []
    if joined:
        yield joined
