"""A model's key-value cache: fill it, go on from it, and say how large it is.

Newer versions of transformers call the argument and the output ``cache``, older ones ``past_key_values``.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from replaceme.families import decoder_of


def filled_cache(model: Any, ids: Tensor) -> Any:
    """Return the cache after token ids (rows, tokens); computes no logits."""
    output = decoder_of(model)(input_ids=ids, use_cache=True)
    return output.cache if getattr(output, "cache", None) is not None else output.past_key_values


def going_on(model: Any, cache: Any) -> dict[str, Any]:
    """Return the arguments of a forward pass that goes on from ``cache`` (None: one that keeps no cache)."""
    if cache is None:
        return {"use_cache": False}
    return {
        "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values": cache,
        "use_cache": True,
    }


@torch.inference_mode()
def cache_bytes_per_token(model: Any) -> int:
    """Return the bytes of keys and values that a loaded model keeps for each token of a short text, over all its layers."""
    tokens = 8
    cache = filled_cache(model, torch.zeros(1, tokens, dtype=torch.long, device=model.device))
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // tokens
