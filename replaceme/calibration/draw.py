"""Draw calibration documents: a seeded choice of texts, as at most ``max_length`` token ids each.

Each document starts with the tokenizer's start of text: exactly one BOS if it has one, even if a chat template adds its own.
Padding isn't stored. Rows without tokens are skipped and counted.

Each document has a source: its row, or the running text that it is a piece of. Few running texts (a .txt file is a single one)
have ``PARTS`` sources each, one after the other, so that documents can be held out by whole sources. Where a text ends before
there are enough documents to hold one out, all are split into smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from replaceme.base.documents import HELD_OUT_EVERY, SOURCE_BITS, Documents, first_documents, in_shares, seeded_order
from replaceme.base.errors import DatasetError
from replaceme.base.parameters import Params
from replaceme.base.progress import logger, progress
from replaceme.calibration.corpus import Corpus, plain_text
from replaceme.calibration.sources import list_sources
from replaceme.calibration.tokenization import encode, encode_in_chunks, start_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"
# One document in so many is held out of a training at the fewest (``replaceme.methods.llm_streamline``): from so many texts on,
# a text is one source.
PARTS = 20
# Little text is split into pieces of no fewer tokens.
SHORTEST_PIECE = 16


@dataclass
class Counts:
    """Numbers of documents drawn and their tokens, of empty rows, and of documents cut to ``max_length``."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    cut: int = 0


def draw_documents(
    corpora: Sequence[Corpus | Documents], tokenizer: PreTrainedTokenizerBase, params: Params
) -> tuple[Documents, list[Counts]]:
    """Return ``dataset_size`` documents, or as many as the corpora have, and the counts of each corpus.

    The next document always comes from the corpus that lacks most of its share of the tokens so far, so shares are met to a
    document, unless a corpus ends early.

    Args:
        corpora: of each source, the rows in the order of use; or documents that are drawn as they are.
        tokenizer: the model's.
        params: the sources with their shares, ``dataset_size``, ``max_length``, ``pack`` and ``seed``.

    Raises:
        DatasetError: nothing is left after tokenization.
    """
    counts = [Counts() for _ in corpora]
    streams = {
        number: enumerate(corpus.documents)
        if isinstance(corpus, Documents)
        else _encode_corpus(corpus, tokenizer, params, counts[number], params.dataset_size)
        for number, corpus in enumerate(corpora)
    }
    shares = [source.share for source in list_sources(params)]
    drawn: Iterator[tuple[int, int, Tensor]] = islice(in_shares(streams, shares), params.dataset_size)
    # The pieces of running texts are all there before the first is drawn, and have a bar of their own.
    if not any(isinstance(corpus, Corpus) and corpus.running for corpus in corpora):
        drawn = progress(drawn, "drawing documents", "documents", total=params.dataset_size)
    documents, sources = [], []
    for number, source, document in drawn:
        counts[number].documents += 1
        counts[number].tokens += len(document)
        documents.append(document)
        # Another number in another corpus.
        sources.append((number << SOURCE_BITS) + source)
    if not documents:
        empty = sum(count.empty for count in counts)
        raise DatasetError(f"dataset: no text is left after tokenization ({empty} rows were empty).")
    if len(documents) < HELD_OUT_EVERY <= params.dataset_size:
        documents, sources = _split_documents(documents, sources, start_of_text(tokenizer), min(PARTS, params.dataset_size))
        for number, count in enumerate(counts):
            own = [document for document, source in zip(documents, sources, strict=True) if source >> SOURCE_BITS == number]
            count.documents, count.tokens = len(own), sum(map(len, own))
    return Documents(documents, sources), counts


def draw_after(
    corpora: Mapping[int, Corpus | Iterable[Tensor]],
    taken: Mapping[int, int],
    tokenizer: PreTrainedTokenizerBase,
    params: Params,
    tokens: int,
) -> Documents:
    """Return documents that reach so many tokens, or all that there are, in the order that ``draw_documents`` goes on in.

    Of more tokens, the first documents of each source are the same.

    Args:
        corpora: by the number of their source: rows to encode, or documents as they are.
        taken: number of a source → how many of its first documents are left out.
        tokenizer: the model's.
        params: the sources with their shares, ``max_length``, ``pack`` and ``seed``.
        tokens: how many.
    """
    streams = {
        number: islice(_encode_corpus(corpus, tokenizer, params, Counts()), taken.get(number, 0), None)
        if isinstance(corpus, Corpus)
        else enumerate(corpus)
        for number, corpus in corpora.items()
    }
    shares = [source.share for source in list_sources(params)]
    drawn = (((number << SOURCE_BITS) + source, document) for number, source, document in in_shares(streams, shares))
    return first_documents(drawn, tokens)


def _split_documents(
    documents: list[Tensor], sources: list[int], prefix: list[int], count: int
) -> tuple[list[Tensor], list[int]]:
    """Halve the longest document until there are ``count``, or all are short; return them and their sources, each its own."""
    pieces = [(source >> SOURCE_BITS, document[len(prefix) :]) for source, document in zip(sources, documents, strict=True)]
    while len(pieces) < count:
        at = max(range(len(pieces)), key=lambda index: len(pieces[index][1]))
        corpus, longest = pieces[at]
        if len(longest) < 2 * SHORTEST_PIECE:
            break
        pieces[at : at + 1] = [(corpus, half) for half in longest.tensor_split(2)]
    start = torch.tensor(prefix, dtype=torch.int64)
    logger.info("calibrate: so little text is split into %d documents, so that some can be held out", len(pieces))
    numbered = [(corpus << SOURCE_BITS) + index for index, (corpus, _) in enumerate(pieces)]
    return [torch.cat([start, body]) for _, body in pieces], numbered


def _encode_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, params: Params, counts: Counts, most: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yield source and token ids, (tokens,) int64, of the corpus' documents; of a running text at most so many pieces."""
    prefix = start_of_text(tokenizer)
    capacity = params.max_length - len(prefix)
    # An embedded text has no other column to choose.
    plain = corpus.plain and not tokenizer.chat_template
    encoded = (encode(plain_text(row) if plain else row, tokenizer, prefix) for row in corpus.rows)
    if corpus.running:
        fewest = HELD_OUT_EVERY if isinstance(params.dataset, str) and params.dataset_size >= HELD_OUT_EVERY else 0
        texts = (encode_in_chunks(text, tokenizer, prefix) for text in corpus.rows if isinstance(text, str))
        bodies: Iterable[tuple[int, list[int]]] = islice(_cut_pieces(texts, capacity, params.seed, fewest), most)
    elif params.pack:
        bodies = enumerate(_pack_rows(encoded, tokenizer.encode(SEPARATOR, add_special_tokens=False), capacity, counts))
    else:
        bodies = enumerate(encoded)
    for source, body in bodies:
        if not body:
            counts.empty += 1
            continue
        counts.cut += len(body) > capacity
        yield source, torch.tensor([*prefix, *body[:capacity]])


def _cut_pieces(texts: Iterable[Iterable[list[int]]], capacity: int, seed: int, fewest: int) -> Iterator[tuple[int, list[int]]]:
    """Cut running texts into pieces of ``capacity`` tokens (a shorter text is one piece) and yield them in a seeded order.

    The rest of a longer text is dropped, if there are ``fewest`` pieces. Each piece comes with the number of its source.
    """
    pieces: list[Tensor] = []
    counts: list[int] = []  # pieces of each text
    for chunks in progress(texts, "tokenizing", "texts"):
        before, rest = len(pieces), torch.empty(0, dtype=torch.int32)
        for chunk in chunks:
            rest = torch.cat([rest, torch.tensor(chunk, dtype=torch.int32)])
            full = len(rest) // capacity * capacity
            pieces += rest[:full].split(capacity) if full else ()
            rest = rest[full:].clone()
        # Of little text in one file, which is split, all of it counts.
        if len(rest) and (len(pieces) == before or len(pieces) < fewest):
            pieces.append(rest)
        counts.append(len(pieces) - before)
    parts = 1 if len(counts) >= PARTS else PARTS
    sources = [text * parts + piece * parts // count for text, count in enumerate(counts) for piece in range(count)]
    for index in seeded_order(len(pieces), seed).tolist():
        yield sources[index], pieces[index].tolist()


def _pack_rows(rows: Iterable[list[int]], separator: list[int], capacity: int, counts: Counts) -> Iterator[list[int]]:
    """Join rows until a document has ``capacity`` tokens or more; the caller drops the excess."""
    packed: list[int] = []
    for ids in rows:
        if not ids:
            counts.empty += 1
            continue
        packed += [*(separator if packed else []), *ids]
        if len(packed) >= capacity:
            yield packed
            packed = []
    if packed:
        yield packed
