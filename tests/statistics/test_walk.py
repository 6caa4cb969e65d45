"""The signals of a walk, against plain hooks and the whole model."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from replaceme.base.documents import Batch, Documents
from replaceme.models.context import ModelContext
from replaceme.models.families import family_of, linears_within, parameter_of
from replaceme.models.layers import EntryState
from replaceme.statistics.features import LINEARS, SIGNAL
from replaceme.statistics.walk import Signal, Signals, signals_for, walk
from tests.conftest import KINDS, LAYERS, PLAIN, PLAIN_REPRESENTATIVES, REPRESENTATIVES, made_model
from tests.helpers import context_of, passing

SIGNALS: tuple[Signal, ...] = ("input", "attention_features", "attention", "mlp_features", "mlp", "output")


class Record:
    """Observer that keeps the real tokens of its signals."""

    def __init__(self, wanted: Mapping[int, frozenset[Signal]]):
        self.names = wanted
        self.kept: dict[tuple[int, Signal], list[Tensor]] = {}

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return self.names

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        for signal in self.names[layer]:
            self.kept.setdefault((layer, signal), []).append(batch.real(signals[signal]).clone())

    def all(self, layer: int, signal: Signal) -> Tensor:
        return torch.cat(self.kept[layer, signal])


def count_calls(module: Any) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_signals_equal_those_of_plain_hooks(kind: str, documents: Documents) -> None:
    model, family = made_model(kind), family_of(made_model(kind).config)
    keep = Record(signals_for([2, 4], *(name for name in SIGNALS if name != "mlp_features" or not family.experts)))
    walk(ModelContext(model, family, documents, 4), [keep], description="test")
    for layer in (2, 4):
        part = family.decoder_layers(model)[layer]
        kept: Callable[[Signal], Tensor] = lambda signal, layer=layer: keep.all(layer, signal)  # type: ignore[misc]  # noqa: E731
        assert close(kept("input") + kept("attention") + kept("mlp"), kept("output"))
        if kind in PLAIN:
            for linear in LINEARS:
                module = family.linear_of(part, linear)
                added = kept(SIGNAL[linear]) @ parameter_of(module, "weight").T
                added = added if getattr(module, "bias", None) is None else added + module.bias
                assert close(family.multiplier * added, kept("attention" if linear == "attention_output" else "mlp"))
        alone = passing(model, layer, documents)
        names: dict[Signal, str] = {"input": "input", "attention": "attention", "mlp": "M", "output": "output"}
        # Batches are sorted by length, documents here are not: values are compared in order of size.
        for signal, name in names.items():
            assert close(kept(signal).sort(dim=0).values, torch.from_numpy(alone[name]).float().sort(dim=0).values)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("signal", "computed"), [("input", 0), ("attention_features", 0), ("attention", 1), ("mlp_features", 1), ("output", 1)]
)
def test_a_walk_ends_at_the_last_signal_that_is_wanted(signal: Signal, computed: int, documents: Documents) -> None:
    model = made_model()
    output, later = count_calls(model.model.layers[3].self_attn.o_proj), count_calls(model.model.layers[4])
    head, last = count_calls(model.lm_head), count_calls(model.model.layers[3].mlp.down_proj)
    walk(context_of(model, documents, len(documents)), [Record(signals_for([3], signal))], description="test")
    assert (len(output), len(last), len(later), len(head)) == (computed, signal == "output", 0, 0)


@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_a_walk_from_a_later_layer_continues_an_earlier_walk(kind: str, documents: Documents) -> None:
    model, whole = made_model(kind), Record(signals_for([2, LAYERS - 1], "output"))
    family = family_of(model.config)
    walk(ModelContext(model, family, documents, 4), [whole], description="test")
    rest, calls = (
        Record(signals_for([LAYERS - 1], "output")),
        count_calls(family.decoder_layers(model)[0].get_submodule(family.mlp)),
    )
    start = EntryState(3, whole.all(2, "output"))
    walk(ModelContext(model, family, documents, 4), [rest], description=None, start=start)
    assert torch.allclose(rest.all(LAYERS - 1, "output"), whole.all(LAYERS - 1, "output"), rtol=1e-5, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("kind", PLAIN_REPRESENTATIVES)
def test_an_attention_whose_features_are_known_computes_its_last_linear_alone(kind: str, documents: Documents) -> None:
    model, layer = made_model(kind), 3
    family = family_of(model.config)
    signals: tuple[Signal, ...] = ("input", "attention_features", "attention", "mlp_features", "output")
    whole, again = Record(signals_for([layer], *signals)), Record(signals_for([layer], *signals[2:]))
    walk(ModelContext(model, family, documents, 4), [whole], description=None)
    part = family.decoder_layers(model)[layer]
    last = family.linear_of(part, "attention_output")
    first = next(each for each in linears_within(part.get_submodule(family.attention)).values() if each is not last)
    calls = count_calls(first)
    start = EntryState(layer, whole.all(layer, "input"), whole.all(layer, "attention_features"))
    walk(ModelContext(model, family, documents, 4), [again], description=None, start=start)
    assert not calls
    for signal in signals[2:]:
        assert torch.allclose(again.all(layer, signal), whole.all(layer, signal), rtol=1e-5, atol=1e-5)
