"""Greedy decoding in batches: the most likely token each time, from the model's KV cache.

Prompts of a batch have one length, so that no padding enters an attention: a batch gives what its prompts give alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from replaceme.models.generation import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.inference_mode()
def continuations(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], tokens: int, until: Sequence[str] = ()
) -> list[str]:
    """Return the text that a model writes after each prompt.

    Args:
        model: the causal model, ready for inference.
        tokenizer: its tokenizer.
        prompts: token ids; all of one length.
        tokens: tokens that are written, at most; an end of text ends them.
        until: texts that end them too; they and what follows are left out.
    """
    ends = _ends(model, tokenizer)
    # The decoded text doesn't show special tokens.
    special = [tokenizer.convert_tokens_to_ids(text) for text in until if text in tokenizer.all_special_tokens]
    ends = list(dict.fromkeys([*ends, *special]))
    plain = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    ids = torch.tensor(prompts, device=model.device)
    stop = _Written(tokenizer, ids.shape[1], until)
    found = generate(model, ids, plain, stopping_criteria=StoppingCriteriaList([stop] if until else []))
    return [stop.text(row) for row in found]


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: those that the model names, else the tokenizer's."""
    named = getattr(model.generation_config, "eos_token_id", None)
    named = tokenizer.eos_token_id if named is None else named
    return [] if named is None else named if isinstance(named, list) else [int(named)]


class _Written(StoppingCriteria):
    """Ends a row whose text, after the prompt, holds one of some texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, until: Sequence[str]):
        self.tokenizer, self.start, self.until = tokenizer, prompt_tokens, [text for text in until if text]

    def __call__(self, input_ids: Any, _scores: Any, **_options: Any) -> Any:
        ended = [any(text in self._written(row) for text in self.until) for row in input_ids]
        return torch.tensor(ended, device=input_ids.device)

    def text(self, row: Tensor) -> str:
        """Return a row's text after the prompt, up to the first of the texts that end it."""
        written = self._written(row)
        return written[: min([len(written), *(place for text in self.until if (place := written.find(text)) >= 0)])]

    def _written(self, row: Tensor) -> str:
        return str(self.tokenizer.decode(row[self.start :].tolist(), skip_special_tokens=True))
