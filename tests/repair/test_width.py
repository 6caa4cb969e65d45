"""Narrower MLPs in every kept layer, for a budget: against plain computations, and as saved."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

from replaceme.base.documents import Documents
from replaceme.base.fingerprints import sha256_below
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.models.families import family_of, inputs_of, parameter_of
from replaceme.models.memory import load_streamed, measure_parts
from replaceme.models.model import Model
from replaceme.models.width import mlp_width_entry
from replaceme.repair.channel_choice import best_channels
from replaceme.statistics.features import LINEARS
from tests.conftest import LAYERS, made_model
from tests.helpers import many_documents, passing, ridge
from tests.methods.helpers import BLOCK, solved

BEST = {"transform": "channels", "repair": True, "alpha": 5.0}


@pytest.mark.parametrize("kind", ["granite"])
def test_the_channels_of_every_layer_are_chosen_and_its_linears_solved_again(kind: str) -> None:
    model, documents = made_model(kind, torch.float64), many_documents()
    family = family_of(model.config)
    assert not family.parallel
    width = 2 * inputs_of(family.linear_of(family.decoder_layers(model)[0], "mlp_output")) // 3
    edits, run_repair = solved(model, documents, (), width, method="uidl", repair=True)
    repairs, _ = run_repair()
    steps, expected = iter(repairs), deepcopy(model)
    for layer in range(LAYERS):
        module, goal = family.decoder_layers(expected)[layer], passing(model, layer, documents)
        attention, mlp = (family.linear_of(module, linear) for linear in LINEARS)
        if layer:
            now = passing(expected, layer, documents)
            _solve(attention, family.multiplier * now["A"], goal["middle"] - now["middle"], goal["middle"], 0.3, next(steps))
        now = passing(expected, layer, documents)
        G, w = family.multiplier * now["G"], 1 / np.square(goal["output"]).sum(1)
        weight = parameter_of(mlp, "weight")
        without = now["output"] - G @ weight.detach().numpy().T
        gram, cross = (torch.from_numpy((G * w[:, None]).T @ right) for right in (G, goal["output"] - without))
        chosen = best_channels(gram, cross, weight.detach().T.clone(), 1.0, width)
        assert torch.equal(edits.channels[layer], torch.stack([torch.full_like(chosen, layer), chosen], dim=1))
        gone = torch.ones(len(G[0]), dtype=torch.bool)
        gone[chosen] = False
        with torch.no_grad():
            weight[:, gone] = 0
        now = passing(expected, layer, documents)
        kept = family.multiplier * now["G"] * (~gone).numpy()
        _solve(mlp, kept, goal["output"] - now["output"], goal["output"], 1.0, next(steps))
    apply_edits(model, family, edits)
    for layer in range(LAYERS):
        assert inputs_of(family.linear_of(family.decoder_layers(model)[layer], "mlp_output")) == width
    text = documents.documents[0][None]
    with torch.no_grad():
        assert torch.allclose(model(text).logits, expected(text).logits, rtol=1e-3, atol=1e-3)


def _solve(linear: torch.nn.Module, g: np.ndarray, error: np.ndarray, target: np.ndarray, size: float, step) -> None:  # type: ignore[no-untyped-def]
    """Add one ridge regression's change to a linear; an input that is always 0 gets none."""
    bias = getattr(linear, "bias", None)
    columns = np.hstack([g, np.ones((len(g), 1))]) if bias is not None else g
    sizes = np.concatenate([np.full(g.shape[1], size * step.ridge), np.zeros(columns.shape[1] - g.shape[1])])
    used = np.square(columns).sum(0) > 0
    zeros = np.zeros((int(used.sum()), error.shape[1]))
    change = step.scale * ridge(
        columns[:, used], error, 1 / np.square(target).sum(1), zeros, sizes[used], bias is not None
    )  # fmt: skip
    whole = np.zeros((columns.shape[1], error.shape[1]))
    whole[used] = change
    with torch.no_grad():
        parameter_of(linear, "weight").add_(torch.from_numpy(whole[: g.shape[1]].T))
        if bias is not None:
            bias += torch.from_numpy(whole[-1])


# Gate and up in one linear; a norm with biases and a parallel MLP.
@pytest.mark.parametrize("kind", ["phi3", "gptj"])
def test_fewer_layers_and_narrower_mlps_are_saved_exactly(
    save_tiny: Callable[..., Model], kind: str, documents: Documents, tmp_path: Path
) -> None:
    source = save_tiny(kind)
    family, width = source.family(), 40
    whole, streamed = source.load(), load_streamed(source, "float32", budget=sum(measure_parts(source, "float32")))
    found = []
    for model in (whole, streamed):
        edits, run_repair = solved(model, documents, (BLOCK,), width, **BEST)
        repairs, figures = run_repair()
        found.append(edits)
        assert {layer for layer in edits.channels} == {0, 1, 4, 5}
        assert all(len(channels) == width for channels in edits.channels.values())
        assert figures["mlp_channels"] == width
        assert {each.layer for each in repairs} == {0, 1, 4, 5}
    assert _equal(*found)
    edits.config = mlp_width_entry(source.config(), family, width)
    edits.parts = "narrower MLPs"
    save_pruned(source, edits, tmp_path / "pruned")
    pruned = Model(tmp_path / "pruned", "pruned")
    figures = verify_export(source, pruned, edits, documents)
    assert figures["hidden_error_mean"] < figures["tolerance"]
    layers = family.decoder_layers(pruned.load())
    assert {inputs_of(family.linear_of(layer, "mlp_output")) for layer in layers} == {width}
    save_pruned(source, edits, tmp_path / "streamed", sum(measure_parts(source, "float32")))
    assert sha256_below(tmp_path / "streamed") == sha256_below(tmp_path / "pruned")
    verify_export(source, Model(tmp_path / "streamed", "streamed"), edits, documents, sum(measure_parts(source, "float32")))


def _equal(one: Edits, other: Edits) -> bool:
    pairs = [(one.channels, other.channels), (one.transforms, other.transforms)]
    pairs += [({at: weight for at, (weight, _) in each.corrections.items()} for each in (one, other))]  # type: ignore[list-item]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)
