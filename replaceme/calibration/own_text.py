"""Text that a model writes itself, sampled at temperature 1: calibration for the model's own distribution, without any data.

Every second document of a chat model is a chat, in which it writes both sides: the chat template gives what stands before and
between the turns, as in Magpie (Xu et al., 2024, arXiv 2406.08464). All others start with the tokenizer's start of text. A
document goes on after an end of text, as in the packed text that models are trained on, so all have the same length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from replaceme.base.accelerators import is_accelerator, to_float64
from replaceme.base.entries import SELF
from replaceme.base.errors import DatasetError, ModelError
from replaceme.base.parameters import Params
from replaceme.base.progress import progress
from replaceme.calibration.sources import list_sources
from replaceme.calibration.tokenization import render_chat, start_of_text
from replaceme.models.kv_cache import cache_arguments, reserved_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a document at most: a step of writing costs the more, the longer the documents are.
MAX_TOKENS = 512
# Documents that are written at once, at most: a step reads all weights, however many they are. And the bytes that their keys
# and values may take.
MAX_ROWS, CACHE_BYTES = 128, 2 << 30
# Documents that are written at once for a training, whose text must begin as that of a shorter one.
BATCH_ROWS = 32


@dataclass(frozen=True)
class Turns:
    """What a chat template puts before the first turn, after a user's turn and after an assistant's turn, as token ids."""

    opening: list[int]
    after_user: list[int]
    after_assistant: list[int]


def count_own_documents(params: Params) -> int:
    """Return the number of documents that the dense model has to write, for its share of ``dataset_size`` documents' tokens.

    Its documents have ``MAX_TOKENS`` tokens, or ``max_length`` if that is less; the others have ``max_length`` at most.
    """
    sources = list_sources(params)
    whole = sum(source.share for source in sources)
    own = sum(source.share for source in sources if source.name == SELF)
    most = params.dataset_size * params.max_length * own / whole / min(MAX_TOKENS, params.max_length)
    return min(math.ceil(most) + 1, params.dataset_size) if own else 0


def write_texts(model: Any, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int) -> list[Tensor]:
    """Return ``count`` documents of ``length`` token ids, (length,) int64 each.

    Args:
        model: the causal model, ready for inference.
        tokenizer: its tokenizer.
        count: number of documents.
        length: tokens of each, with its start of text.
        seed: of the sampling; the same seed gives the same text on the same kind of device.

    Raises:
        ModelError: the tokenizer has no token that a text could start with; the model has no KV cache, or its predictions
            overflow.
    """
    return _write_all(model, tokenizer, {seed: count}, length)


def write_batches(model: Any, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int) -> list[Tensor]:
    """Return documents as of ``write_texts``; batch i is written whole, with seed + i: a larger ``count`` only appends."""
    counts = dict.fromkeys(range(seed, seed + math.ceil(count / BATCH_ROWS)), BATCH_ROWS)
    return _write_all(model, tokenizer, counts, length)[:count]


def _write_all(model: Any, tokenizer: PreTrainedTokenizerBase, counts: Mapping[int, int], length: int) -> list[Tensor]:
    """Return documents as of ``write_texts``: for each seed, so many."""
    # Grouped heads need less.
    token_bytes = 2 * int(model.config.num_hidden_layers) * int(model.config.hidden_size) * model.dtype.itemsize
    rows = min(MAX_ROWS, max(CACHE_BYTES // (token_bytes * length), 1))
    plain, turns = choose_start(tokenizer), find_chat_turns(tokenizer)
    documents: list[Tensor] = []
    devices = [model.device] if is_accelerator(model.device) else []
    steps = progress(range((length - 1) * sum(math.ceil(count / rows) for count in counts.values())), "writing text", "steps")
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"), torch.inference_mode():
        for seed, count in counts.items():
            torch.manual_seed(seed)
            starts = [turns.opening if turns and number % 2 else plain for number in range(count)]
            for first in range(0, count, rows):
                documents += _write_batch(model, starts[first : first + rows], length, turns, steps)
        next(steps, None)
    # Copies, of their own size and usable outside of inference: rows of one tensor would be stored with all of it.
    return [document.clone() for document in documents]


def choose_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that a text of the model's own starts with, unless it is a chat."""
    if prefix := start_of_text(tokenizer):
        return prefix
    # Where a tokenizer puts nothing before a text, training texts are separated by the end of text.
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return [int(token)]
    raise ModelError("dataset: self needs a tokenizer with a bos or eos token, to start a text with; name a text instead.")


def find_chat_turns(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Return what the chat template puts around the turns; None without a template, or where it shows no separate turns."""
    if not tokenizer.chat_template:
        return None
    marks = ["first question", "first answer", "second question"]
    chat = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)]
    try:
        text = render_chat(chat, tokenizer)
    except DatasetError:
        return None
    if any(text.count(mark) != 1 for mark in marks):
        return None
    parts, rest = [], text
    for mark in marks:
        before, rest = rest.split(mark)
        parts.append(list(tokenizer.encode(before, add_special_tokens=False)))
    prefix = start_of_text(tokenizer)
    if parts[0][: len(prefix)] != prefix:
        parts[0] = [*prefix, *parts[0]]
    return Turns(*parts) if all(parts) else None


def _write_batch(model: Any, starts: list[list[int]], length: int, turns: Turns | None, steps: Iterator[int]) -> list[Tensor]:
    """Sample at temperature 1 over the whole vocabulary, a token of all rows a step; an end of text ends nothing."""
    # Rows begin with one token, so that all are equally long; the others of a start are forced.
    texts = torch.empty(len(starts), length, dtype=torch.int64)
    texts[:, 0] = torch.tensor([start[0] for start in starts])
    forced, cache = _ForcedTokens(starts, turns), reserved_cache(model.config, length)
    arguments = cache_arguments(model, cache)
    for position in range(1, length):
        next(steps, None)
        last = texts[:, position - 1]
        logits = model(last[:, None].to(model.device), **arguments).logits[:, -1]
        if cache.get_seq_length() != position:
            raise ModelError("dataset: self needs a model with a cache of keys and values, to go on from; name a text instead.")
        texts[:, position] = torch.tensor(forced.replace(_sample_tokens(logits).tolist(), last.tolist()))
    return list(texts)


def _sample_tokens(logits: Tensor) -> Tensor:
    """Return a token of each row, (rows,) int64, with the probabilities softmax(logits), (rows, words).

    By the inverse of the cumulative distribution: one random number a row, where ``torch.multinomial`` takes one a word.
    """
    cumulative = to_float64(logits).softmax(-1).cumsum(-1)
    if not bool(cumulative[:, -1].isfinite().all()):
        raise ModelError("dtype: the model's predictions overflow while it writes its own text; use bfloat16 or float32.")
    drawn = torch.rand(len(logits), 1, dtype=torch.float64, device=cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


class _ForcedTokens:
    """Force a text's start; and in a chat, after the token that ends a turn, the template's others up to the next turn."""

    def __init__(self, starts: list[list[int]], turns: Turns | None):
        self.queues = [start[1:] for start in starts]
        # What follows the present turn of each row, then what follows the next one; nothing in a plain text.
        chats = [turns and start == turns.opening for start in starts]
        self.after = [[turns.after_user, turns.after_assistant] if turns and chat else [] for chat in chats]
        self.was_forced = [True] * len(starts)

    def replace(self, sampled: list[int], last: list[int]) -> list[int]:
        """Return each row's next token: the one that is forced, or the sampled one.

        Args:
            sampled: each row's token, as sampled.
            last: the token before it.
        """
        for row, token in enumerate(last):
            if self.after[row] and not self.was_forced[row] and token == self.after[row][0][0]:
                self.queues[row] = self.after[row][0][1:]
                self.after[row].reverse()
            self.was_forced[row] = bool(self.queues[row])
        return [queue.pop(0) if queue else token for queue, token in zip(self.queues, sampled, strict=True)]
