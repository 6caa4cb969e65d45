"""Prompts whose continuations by the dense and the pruned model stand side by side: no score, but what a reader tries first."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from replaceme.base.errors import DatasetError
from replaceme.base.progress import progress
from replaceme.corpora.tokenization import encode, start_of_text
from replaceme.evaluation.greedy import continuations
from replaceme.models.model import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 40


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        kind: what it tries.
        text: the prompt.
        chat: whether it is a user's turn, if the tokenizer has a chat template.
        answer: what a right continuation holds, if that is known.
    """

    kind: str
    text: str
    chat: bool = False
    answer: str = ""


PROMPTS = (
    Prompt("prose", "The river rose in the night, and by the morning"),
    Prompt("chat", "Give me three tips for a good night's sleep.", chat=True),
    Prompt("question", "What is the capital of France?", chat=True, answer="Paris"),
)


def written(model: Any, tokenizer: PreTrainedTokenizerBase, description: str) -> list[str]:
    """Return how a model goes on after each of ``PROMPTS``, by greedy decoding: up to ``TOKENS`` tokens.

    Args:
        model: the causal model, ready for inference.
        tokenizer: its tokenizer.
        description: the model's name in the progress bar.
    """
    longest = positions_of(model.config)
    tokens = min(TOKENS, longest // 2)
    return [
        continuations(model, tokenizer, [_encoded(prompt, tokenizer)[tokens - longest :]], tokens)[0]
        for prompt in progress(PROMPTS, f"{description}: continuations", "prompts")
    ]


def side_by_side(dense: Sequence[str], pruned: Sequence[str]) -> list[dict[str, str]]:
    """Return ``{kind, prompt, answer, dense, pruned}`` for each prompt; ``answer`` is empty where it isn't known."""
    return [
        {"kind": prompt.kind, "prompt": prompt.text, "answer": prompt.answer, "dense": before, "pruned": after}
        for prompt, before, after in zip(PROMPTS, dense, pruned, strict=True)
    ]


def _encoded(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a prompt's ids: through the chat template, or plain where there is none or it refuses a user's turn."""
    prefix = start_of_text(tokenizer)
    if prompt.chat and tokenizer.chat_template:
        with suppress(DatasetError):
            return [*prefix, *encode([{"role": "user", "content": prompt.text}], tokenizer, prefix, reply=True)]
    return [*prefix, *encode(prompt.text, tokenizer, prefix)]
