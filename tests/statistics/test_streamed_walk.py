"""Walks through streamed models: layer by layer, each read once, and to the same bits as batch by batch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from replaceme.base.documents import Batch, Documents
from replaceme.base.plan import Block
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, family_of
from replaceme.models.memory import load_streamed
from replaceme.models.model import Model
from replaceme.models.streaming import LayerStream, stream_of
from replaceme.statistics.cut_statistics import STATISTICS, take_statistics
from replaceme.statistics.profile import profile_model
from replaceme.statistics.walk import Signal, Signals, signals_for, walk
from tests.conftest import EXPERTS, LAYERS, NORM_AFTER_MLP, REPRESENTATIVES, made_config


class Recorder:
    """Observer of all signals of all layers."""

    def __init__(self, family: Family):
        features: tuple[Signal, ...] = () if family.experts else ("attention_features", "mlp_features")
        self.names: tuple[Signal, ...] = ("input", "attention", "mlp", "output", *features)
        self.seen: dict[tuple[int, str], list[Tensor]] = {}
        self.order: list[tuple[int, int]] = []

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return signals_for(range(LAYERS), *self.names)

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        self.order.append((layer, batch.first_token))
        for name in self.names:
            self.seen.setdefault((layer, name), []).append(signals[name].clone())
        # Kept for the next layer.
        if layer:
            assert torch.equal(batch.scratch.pop((self, layer - 1)), signals["input"])
        batch.scratch[self, layer] = signals["output"]


def pair(source: Model, dtype: str = "bfloat16") -> tuple[Any, Any, LayerStream]:
    """Return a model resident and streamed, with room for two layers, and its stream."""
    model = load_streamed(source, dtype, budget=1 << 40)
    own = stream_of(model)
    assert own is not None
    own.budget = 2 * max(own.sizes)
    return source.load(dtype), model, own


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_all_signals_are_the_same_bits_and_each_layer_is_read_once(
    save_tiny: Callable[..., Model], documents: Documents, kind: str
) -> None:
    *models, own = pair(save_tiny(kind))
    family = family_of(made_config(kind))
    resident, streamed = (Recorder(family) for _ in models)
    for model, recorder in zip(models, (resident, streamed), strict=True):
        walk(ModelContext(model, family, documents, 2), [recorder], description=None)
    assert streamed.order == sorted(resident.order)
    for key, expected in resident.seen.items():
        assert all(map(torch.equal, streamed.seen[key], expected)), key
    assert own.bytes_read == sum(own.sizes)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen2_moe", "falcon"])
def test_profile_and_statistics_are_the_same_bits(
    save_tiny: Callable[..., Model], documents: Documents, kind: str, tmp_path: Path
) -> None:
    resident, streamed, own = pair(save_tiny(kind))
    family, block = family_of(made_config(kind)), Block(2, 4)
    names = [name for name in STATISTICS if "features" not in name or kind not in EXPERTS + NORM_AFTER_MLP]
    names = [name for name in names if "tokens" not in name]
    assert profile_model(ModelContext(streamed, family, documents, 2)) == profile_model(
        ModelContext(resident, family, documents, 2)
    )
    assert own.bytes_read == sum(own.sizes)
    found, expected = (
        take_statistics(ModelContext(each, family, documents, 2, tmp_path), block, names) for each in (streamed, resident)
    )
    assert equal(found, expected)
