"""The reference: what a pruned model computes for a few texts, kept beside its weights, so that whoever serves it can compare.

It lies in a folder of its own, where no runtime takes it for weights, and is computed in float32 from the weights as they are
stored. For some prompts it has the ids, log p of each next token, and log p of the most likely token after them; for some, the
greedy continuation; for one, the state after each layer; further the ids of odd strings, and a chat as the template renders it.
The texts are the program's own: a calibration text may be private, and the folder is published.
``replaceme.export.comparison`` compares.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from replaceme.base.errors import DatasetError, ModelError, excerpt
from replaceme.calibration.tokenization import render_chat
from replaceme.models.generation import generate
from replaceme.models.interleaving import interleave_forwards
from replaceme.models.model import positions_of
from replaceme.models.model_files import REFERENCE

PROMPTS = (
    "The river rises in the hills above the town, runs past the old mill and the railway bridge, and reaches the sea after "
    "sixty kilometres; in spring it floods the meadows.",
    "def largest(numbers):\n    best = numbers[0]\n    for each in", "Question: What is the capital of Italy?\nAnswer:",
    "Once upon a time there was a miller who", "1, 2, 4, 8, 16, 32,", '{"name": "Ada", "year": 1815}',
    "Water boils at a lower temperature", "Der Zug hat heute",
    "Le marché se tient chaque", "El tren llega a Madrid", "Сегодня",
    "今天天气", "この本は", "역이", "الكتاب",
    "Dear Sir or Madam,\n\nThank you",
    "# Recipe\n\n- 200 g flour\n- 3 eggs\n", "SELECT name, COUNT(*) FROM",
    "If a train travels at 80 km/h", "She said that she would come, but",
    "Patients reported a mild", "Monday, Tuesday, Wednesday,",
    "All animals need food. A dog", "<html>\n<head><title>",
    "In 1969, two people walked on the", "x² + 2x + 1 = (x + 1)²", "for (int i = 0; i < n; i++) {",
    "Breaking news: the council has voted to", "My favourite colour is blue, and", "red green blue red green",
    "To be added: one tablespoon of", "Good morning! How are you today?",
)  # fmt: skip
# Where tokenizers differ: white space, digits, case, accents, signs, scripts, and names of special tokens.
STRINGS = (
    " ", "  leading", "trailing  ", "a\tb", "a\n\n\nb", "\r\n", "    four", "1234567890", "3.14159", "1,000,000", "0x1F",
    "don't won't I'll", "HELLO World hELLO", "naïve café", "e\u0301", "ﬁne", "Straße", "½ ¼ ²", "“quoted”—dash…",
    "a_b-c.d/e\\f", "user@example.org", "https://example.org/?q=1&p=2", "!!!???", "🙂👍🏽", "你好，世界", "नमस्ते", "สวัสดี",
    "<s></s>", "<|im_start|>user", "<unk> <pad> [INST]", "\u200bzero\u200bwidth", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)  # fmt: skip
TURNS = ("What is the capital of France?", "Paris.", "And of Italy?")
CHAT = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(TURNS)]
BATCH = 8
# Greedy continuations: of so many prompts' first tokens, of so many tokens.
STARTS, START, GENERATED = 4, 6, 8
# Entries of the states that are kept: of the last token of the first prompt.
STATE_ENTRIES = 64


@dataclass(frozen=True)
class Continuation:
    """What greedy decoding writes after a text: the text, and log p of each token; none where they can't be seen."""

    start: str
    text: str
    logprobs: list[float]
    start_ids: list[int]


@dataclass(frozen=True)
class Readings:
    """What a model computes for the texts. What can't be seen of it is None, or empty.

    Attributes:
        ids: token ids of the prompts and, after them, of the strings.
        logprobs: log p of each prompt's tokens but the first, natural logarithm.
        firsts: log p of the most likely token after each prompt.
        continuations: of the first tokens of some prompts.
        chat: the chat as the template renders it.
        chat_tokens: the number of its tokens.
        rows: the rows of the embedding.
        states: the states that enter the first layer and leave each, (layers + 1, entries) float32.
    """

    ids: list[list[int] | None]
    logprobs: list[list[float] | None] = field(default_factory=list)
    firsts: list[float | None] = field(default_factory=list)
    continuations: list[Continuation] = field(default_factory=list)
    chat: str | None = None
    chat_tokens: int | None = None
    rows: int | None = None
    states: Tensor | None = None


@torch.inference_mode()
def read_model(model: Any, tokenizer: Any, reference: Readings | None = None) -> Readings:
    """Compute the readings of a loaded model, given the token ids of a reference; None gives it those of its tokenizer."""
    ids = [list(tokenizer(text).input_ids) for text in (*PROMPTS, *STRINGS)]
    limit = positions_of(model.config)
    given = [(each or [])[:limit] for each in (reference.ids if reference else ids)[: len(PROMPTS)]]
    rows = int(model.get_input_embeddings().weight.shape[0])
    try:
        chat = render_chat(CHAT, tokenizer, reply=True)
        chat_ids = list(tokenizer(chat, add_special_tokens=False).input_ids)
    except DatasetError:  # there is no template, or it refuses the chat
        chat, chat_ids = None, []
    own = Readings([*ids], chat=chat, chat_tokens=len(chat_ids) or None, rows=rows)
    if max(map(max, given)) >= rows:
        return own
    # What follows a text changes nothing in it, so that padding needs no mask.
    batches = [given[first : first + BATCH] for first in range(0, len(given), BATCH)]
    read = interleave_forwards(model, (partial(_read_batch, model, batch) for batch in batches))
    logprobs, firsts = zip(*chain.from_iterable(read), strict=True)
    starts = [each.start_ids for each in reference.continuations] if reference else _choose_starts(tokenizer, given)
    continuations = _continue(model, tokenizer, starts) if starts else []
    states = model(torch.tensor([given[0]], device=model.device), output_hidden_states=True, use_cache=False).hidden_states
    width = min(STATE_ENTRIES, *(state.shape[-1] for state in states))
    kept = torch.stack([state[0, -1, :width].float().cpu() for state in states])
    return replace(own, logprobs=[*logprobs], firsts=[*firsts], continuations=continuations, states=kept)


def _read_batch(model: Any, prompts: Sequence[list[int]]) -> list[tuple[list[float], float]]:
    """Return the log-probabilities of each prompt's tokens but the first, and that of the most likely token after it."""
    batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
    logits = model(batch.to(model.device), use_cache=False).logits
    read = []
    for ids, row in zip(prompts, logits, strict=True):
        scores = row[: len(ids)].float().log_softmax(-1).cpu()
        own = scores[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
        read.append((own.tolist(), scores[-1].max().item()))
    return read


def _choose_starts(tokenizer: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the first tokens of some prompts, equally many, whose text has the same tokens again."""
    starts = (ids[:START] for ids in prompts if len(ids) > START)
    fitting = [start for start in starts if list(tokenizer(_text_of(tokenizer, start)).input_ids) == start]
    return fitting[:STARTS]


def _text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _continue(model: Any, tokenizer: Any, starts: Sequence[list[int]]) -> list[Continuation]:
    """Return the greedy continuations of equally long starts; each ends at an end of text, as a server's does."""
    from transformers import GenerationConfig

    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else ends
    greedy = GenerationConfig(max_new_tokens=GENERATED, do_sample=False, eos_token_id=ends, pad_token_id=0)
    texts = generate(model, torch.tensor(starts, device=model.device), greedy)
    scores = model(texts.to(model.device), use_cache=False).logits.float().log_softmax(-1).cpu()
    best = scores.max(-1).values[:, START - 1 : -1].tolist()
    continuations = []
    for start, row, logprobs in zip(starts, texts[:, START:].tolist(), best, strict=True):
        end = next((at for at, token in enumerate(row) if ends and token in ends), len(row))
        continuations.append(Continuation(_text_of(tokenizer, start), _text_of(tokenizer, row[:end]), logprobs[:end], start))
    return continuations


def save_reference(readings: Readings, folder: Path) -> None:
    """Write the readings of a model into its folder."""
    (folder / REFERENCE).parent.mkdir(exist_ok=True)
    content = {key: value for key, value in asdict(readings).items() if key != "states"}
    states = torch.empty(0) if readings.states is None else readings.states
    save_file({"states": states}, folder / REFERENCE, {"readings": json.dumps({**content, "texts": [*PROMPTS, *STRINGS]})})


def load_reference(folder: Path) -> Readings:
    """Return the readings in a model's folder.

    Raises:
        ModelError: there are none, they can't be read, or another version of this program wrote them, for other texts.
    """
    path, again = folder / REFERENCE, "prune it again, or name the pruned model by --reference"
    if not path.is_file():
        raise ModelError(f"{excerpt(folder, 150)}: has no {REFERENCE}; {again}.")
    try:
        with safe_open(path, "pt") as file:
            content, states = json.loads(file.metadata()["readings"]), file.get_tensor("states")
        if content.pop("texts") != [*PROMPTS, *STRINGS]:
            raise ValueError("made for other texts")
        content["continuations"] = [Continuation(**each) for each in content["continuations"]]
        return Readings(**content, states=states if len(states) else None)
    except Exception as failure:  # a damaged file shows in exceptions of many kinds
        raise ModelError(f"{excerpt(path, 150)}: can't be used ({excerpt(failure, 100)}); {again}.") from failure
