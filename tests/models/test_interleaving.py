"""Computations side by side with a streamed model: the same results as one by one, each layer read once for all of them."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from replaceme.models.interleaving import interleave_forwards
from replaceme.models.memory import load_streamed
from replaceme.models.model import Model
from replaceme.models.streaming import LayerStream, stream_of

TEXTS = [torch.arange(2 + first, 2 + first + length)[None] for first, length in ((0, 30), (5, 12), (40, 30), (9, 21), (7, 3))]


@pytest.fixture
def pair(tiny: Model) -> tuple[Any, Any, LayerStream]:
    """The model resident, streamed with room for two layers, and its stream."""
    model = load_streamed(tiny, "float32", budget=1 << 40)
    own = stream_of(model)
    assert own is not None
    own.budget = 2 * max(own.sizes)
    return tiny.load("float32"), model, own


@torch.inference_mode()
def logits(model: Any, text: Tensor) -> Tensor:
    return model(text, use_cache=False).logits  # type: ignore[no-any-return]


def generated(model: Any, text: Tensor) -> Tensor:
    return model.generate(text, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True).logits[-1]  # type: ignore[no-any-return]


def test_passes_share_each_layer(pair: tuple[Any, Any, LayerStream]) -> None:
    resident, model, own = pair
    found, expected = (
        [*interleave_forwards(each, [partial(logits, each, text) for text in TEXTS])] for each in (model, resident)
    )
    assert all(map(torch.equal, found, expected))
    assert own.bytes_read == sum(own.sizes)


def test_generations_of_different_lengths_share_what_they_can(pair: tuple[Any, Any, LayerStream]) -> None:
    resident, model, own = pair
    tasks = [partial(generated, model, text) for text in TEXTS] + [partial(logits, model, TEXTS[0])]
    found = [*interleave_forwards(model, tasks)]
    expected = [*(generated(resident, text) for text in TEXTS), logits(resident, TEXTS[0])]
    assert all(map(torch.equal, found, expected))
    # Five passes each.
    assert own.bytes_read <= 5 * sum(own.sizes)


def test_an_error_of_one_ends_all(pair: tuple[Any, Any, LayerStream]) -> None:
    _, model, own = pair

    def failing() -> Tensor:
        logits(model, TEXTS[1])
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        [*interleave_forwards(model, [partial(generated, model, TEXTS[0]), failing, partial(generated, model, TEXTS[2])])]
    # The model works as before.
    assert torch.isfinite(logits(model, TEXTS[0])).all()
    assert not any(layer._forward_pre_hooks for layer in own.layers)
