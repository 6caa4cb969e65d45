"""Generation with transformers' own loop and the model's KV cache, by a given configuration alone."""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig


def generate(model: Any, ids: Tensor, config: GenerationConfig, **options: Any) -> Tensor:
    """Return prompts with what the model writes after them, (rows, tokens) int64 on the processor.

    What ``config`` leaves open, transformers takes from the model's own configuration (a temperature, a penalty for
    repetition). Here it doesn't.

    Args:
        model: the loaded model.
        ids: (rows, tokens) int64, without padding, on the model's device.
        config: how to generate.
        options: other arguments of ``model.generate``.
    """
    own, model.generation_config = model.generation_config, config
    try:
        texts: Tensor = model.generate(ids, attention_mask=ids.new_ones(ids.shape), generation_config=config, **options)
    finally:
        model.generation_config = own
    return texts.cpu()
