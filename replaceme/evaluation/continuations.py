"""Text that a model writes after a prompt: the answers of generation tasks, and continuations of a few prompts in the report.

A batch is decoded from the model's KV cache, the most likely token each time unless a task asks for samples. Its prompts have
one length, so that no padding enters an attention: a batch gives what its prompts give alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import postprocess_generated_text
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from replaceme.base.errors import DatasetError
from replaceme.base.progress import progress
from replaceme.calibration.tokenization import encode, start_of_text
from replaceme.models.generation import generate
from replaceme.models.model import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 40


@dataclass(frozen=True)
class Prompt:
    """A prompt of the report.

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


def continue_prompts(model: Any, tokenizer: PreTrainedTokenizerBase, description: str) -> list[str]:
    """Return how a model goes on after each of ``PROMPTS``: up to ``MAX_TOKENS`` tokens, the most likely ones.

    Args:
        model: the causal model, ready for inference.
        tokenizer: its tokenizer.
        description: the model's name in the progress bar.
    """
    positions = positions_of(model.config)
    tokens = min(MAX_TOKENS, positions // 2)
    return [
        write_continuations(model, tokenizer, [_encode_prompt(prompt, tokenizer)[tokens - positions :]], tokens)[0]
        for prompt in progress(PROMPTS, f"{description}: continuations", "prompts")
    ]


def pair_continuations(dense: Sequence[str], pruned: Sequence[str]) -> list[dict[str, str]]:
    """Return ``{kind, prompt, answer, dense, pruned}`` for each prompt; ``answer`` is empty where it isn't known."""
    return [
        {"kind": prompt.kind, "prompt": prompt.text, "answer": prompt.answer, "dense": before, "pruned": after}
        for prompt, before, after in zip(PROMPTS, dense, pruned, strict=True)
    ]


def _encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a prompt's ids: through the chat template, or plain where there is none or it refuses a user's turn."""
    prefix = start_of_text(tokenizer)
    if prompt.chat and tokenizer.chat_template:
        with suppress(DatasetError):
            return [*prefix, *encode([{"role": "user", "content": prompt.text}], tokenizer, prefix, reply=True)]
    return [*prefix, *encode(prompt.text, tokenizer, prefix)]


@torch.inference_mode()
def write_continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    until: Sequence[str] = (),
    **sampling: Any,
) -> list[str]:
    """Return the text that a model writes after each prompt.

    Args:
        model: the causal model, ready for inference.
        tokenizer: its tokenizer.
        prompts: token ids; all of one length.
        max_tokens: tokens that are written, at most; an end of text ends them.
        until: texts that end them too; they and what follows are left out.
        sampling: options of ``GenerationConfig``; without any, the most likely token each time.
    """
    # The decoded text doesn't show special tokens.
    special = [tokenizer.convert_tokens_to_ids(text) for text in until if text in tokenizer.all_special_tokens]
    ends = list(dict.fromkeys([*_find_end_tokens(model, tokenizer), *special]))
    config = GenerationConfig(
        max_new_tokens=max_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **sampling
    )
    ids = torch.tensor(prompts, device=model.device)
    stop = _StopTexts(tokenizer, ids.shape[1], [text for text in until if text])
    rows = generate(model, ids, config, stopping_criteria=StoppingCriteriaList([stop] if stop.until else []))
    return [postprocess_generated_text(stop.decode(row), stop.until, None) for row in rows]


def _find_end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: those that the model names, else the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = tokenizer.eos_token_id if named is None else named
    return [] if named is None else named if isinstance(named, list) else [int(named)]


class _StopTexts(StoppingCriteria):
    """Ends a row whose text, after the prompt, holds one of some texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, until: list[str]):
        self.tokenizer, self.prompt_tokens, self.until = tokenizer, prompt_tokens, until

    def __call__(self, input_ids: Any, _scores: Any, **_options: Any) -> Any:
        texts = map(self.decode, input_ids)
        return torch.tensor([any(stop in text for stop in self.until) for text in texts], device=input_ids.device)

    def decode(self, row: Any) -> str:
        return str(self.tokenizer.decode(row[self.prompt_tokens :].tolist(), skip_special_tokens=True))
