"""Draw calibration documents: a seeded choice of texts, as token ids of at most ``max_length``.

Every document starts as the tokenizer starts a text, with one BOS where it has one, also where a chat template writes a
BOS of its own. Padding isn't stored, and documents that are empty after tokenization are counted.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from replaceme.corpora import Corpus, find_dataset
from replaceme.documents import Documents
from replaceme.errors import DatasetError
from replaceme.files import new_folder, read_json, write_json
from replaceme.models import recorded_model
from replaceme.params import Params
from replaceme.progress import logger, progress
from replaceme.tokenization import encode, encode_in_chunks, start_of_text
from replaceme.workspace import Workspace

SEPARATOR = "\n\n"


@dataclass
class Counts:
    """What became of the rows that were read."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    cut: int = 0


def calibrate(params: Params, work: Workspace) -> None:
    """Write the calibration documents and their counts."""
    tokenizer = recorded_model(params, work.tokenizer_input).tokenizer()
    source = find_dataset(params, read_json(work.dataset_input).get("commits"))
    corpus = source.open()
    if corpus.running and params.pack:
        logger.info("pack: has no effect on a running text, whose documents are full")
    documents, counts = draw_documents(
        corpus, tokenizer, params.dataset_size, params.max_length, pack=params.pack, seed=params.seed
    )
    with new_folder(work.documents) as folder:
        documents.save(folder)
        write_json(folder / "documents.json", asdict(counts))
    logger.info(
        "calibrate: %d documents, %d tokens from %s (%d cut to %d tokens, %d empty ones passed over)",
        counts.documents, counts.tokens, params.dataset, counts.cut, params.max_length, counts.empty,
    )  # fmt: skip
    if counts.documents < params.dataset_size:
        logger.warning("dataset_size: %s gave %d documents, not %d", params.dataset, counts.documents, params.dataset_size)


def draw_documents(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, size: int, max_length: int, *, pack: bool, seed: int
) -> tuple[Documents, Counts]:
    """Return ``size`` documents, or as many as the corpus has.

    Args:
        corpus: rows in the order in which they are to be taken.
        tokenizer: the model's.
        size: number of documents.
        max_length: tokens of a document at most, its BOS included.
        pack: join short rows until a document is full.
        seed: picks among the pieces of a running text.

    Raises:
        DatasetError: nothing is left after tokenization.
    """
    prefix = start_of_text(tokenizer)
    room = max_length - len(prefix)
    counts = Counts()
    encoded = (encode(row, tokenizer, prefix) for row in corpus.rows)
    if corpus.running:
        texts = (text for text in corpus.rows if isinstance(text, str))
        bodies: Iterable[list[int]] = _pieces((encode_in_chunks(text, tokenizer, prefix) for text in texts), room, size, seed)
    elif pack:
        bodies = _packed(encoded, tokenizer.encode(SEPARATOR, add_special_tokens=False), room, counts)
    else:
        bodies = encoded
    drawn: list[Tensor] = []
    for body in progress(bodies, "drawing documents", "documents", total=size):
        if not body:
            counts.empty += 1
            continue
        counts.cut += len(body) > room
        drawn.append(torch.tensor([*prefix, *body[:room]]))
        if len(drawn) == size:
            break
    if not drawn:
        raise DatasetError(f"dataset: no text is left after tokenization ({counts.empty} rows were empty).")
    documents = Documents(drawn)
    counts.documents, counts.tokens = len(documents), documents.token_count
    return documents, counts


def _pieces(texts: Iterable[Iterable[list[int]]], room: int, size: int, seed: int) -> Iterator[list[int]]:
    """Cut running texts into full pieces (a short text is one piece), and yield ``size`` of them in a seeded order."""
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
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    yield from (pieces[index].tolist() for index in order[:size])


def _packed(rows: Iterable[list[int]], separator: list[int], room: int, counts: Counts) -> Iterator[list[int]]:
    """Join rows until a document is full; what the last row has too much is dropped."""
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
