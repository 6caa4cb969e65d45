"""An MLP made of several layers' channels: its computation, the choice of channels, and the exact export."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from replaceme.base.combinations import refusals
from replaceme.base.documents import Documents, few_documents
from replaceme.base.errors import ModelError, SolveError
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block
from replaceme.edits.channels import assemble_mlp, channels_of
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.edits.unfused import unfused
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.methods.registry import METHODS
from replaceme.models.context import ModelContext
from replaceme.models.families import family_of, inputs_of
from replaceme.models.model import Model
from replaceme.repair.channel_choice import Candidates, ScreenedCandidates, best_channels, likely_channels
from replaceme.statistics.sums import mirror
from replaceme.statistics.walk import walk
from tests.conftest import PLAIN_REPRESENTATIVES, made_model
from tests.helpers import many_documents, passing
from tests.methods.helpers import BLOCK, model_refusals, solved

FOLDING = [kind for kind in PLAIN_REPRESENTATIVES if not kind.startswith("falcon")]


@pytest.mark.parametrize("kind", FOLDING)
def test_a_layers_channels_compute_in_the_host_as_its_norm_and_mlp_do(kind: str) -> None:
    model, documents = made_model(kind, torch.float64), many_documents(3)
    family, host, source = family_of(model.config), 1, 3
    layers = family.decoder_layers(model)
    other = deepcopy(model)
    # Put the source's norm and MLP into the host. Where the attention shares that norm, it changes too, but not the MLP.
    for path in {family.mlp_norm, family.mlp_output.rpartition(".")[0] or "fc1", family.mlp_output}:
        family.decoder_layers(other)[host].set_submodule(path, deepcopy(layers[source].get_submodule(path)))
    expected = passing(other, host, documents)["G"]
    count = inputs_of(family.linear_of(layers[host], "mlp_output"))
    with unfused(model, family, Edits("", [], channels={host: channels_of(source, count)})):
        found = passing(model, host, documents)["G"]
    assert np.abs(found - expected).max() < 1e-9 * np.abs(expected).max()
    assert np.abs(found - passing(model, host, documents)["G"]).max() > 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("kind", FOLDING)
def test_a_wider_mlp_computes_each_channel_as_alone(kind: str) -> None:
    model, documents = made_model(kind, torch.float64), many_documents(3)
    family, host = family_of(model.config), 2
    count = inputs_of(family.linear_of(family.decoder_layers(model)[host], "mlp_output"))
    alone = {}
    for layer in (2, 3):
        with unfused(model, family, Edits("", [], channels={host: channels_of(layer, count)})):
            alone[layer] = passing(model, host, documents)["G"]
    every = torch.cat([channels_of(layer, count) for layer in (2, 3)])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.named_parameters()}
    with unfused(model, family, Edits("", [], channels={host: every[order]})):
        wide = passing(model, host, documents)["G"]
    assert np.allclose(wide, np.hstack([alone[2], alone[3]])[:, order.numpy()], rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_layers_own_channels_change_nothing() -> None:
    model = made_model(dtype=torch.float64)
    same = deepcopy(model)
    family = family_of(model.config)
    apply_edits(model, family, Edits("", [], channels={2: channels_of(2, 48)}))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))


def test_a_zero_in_the_hosts_norm_gives_no_infinity() -> None:
    model = made_model()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = 0.0
    values = dict(assemble_mlp(family_of(model.config), model.model.layers, 1, channels_of(2, 48)))
    assert all(bool(torch.isfinite(value).all()) for value in values.values())
    assert not values["mlp.up_proj.weight"][:, 3].any()


def test_a_norms_bias_that_no_linear_can_absorb_is_an_error() -> None:
    model = made_model("gpt2")
    for layer in model.transformer.h:
        layer.mlp.c_fc.bias = None
    with pytest.raises(ModelError, match=r"mlp\.c_fc has no bias to absorb that of ln_2"):
        dict(assemble_mlp(family_of(model.config), model.transformer.h, 1, channels_of(2, 48)))


def problem(features: int, outputs: int = 5, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(features)
    mixing = torch.randn(features, features, generator=chance, dtype=torch.float64)
    g = torch.randn(tokens, features, generator=chance, dtype=torch.float64) @ mixing
    e = torch.randn(tokens, outputs, generator=chance, dtype=torch.float64)
    return g, e, torch.randn(features, outputs, generator=chance, dtype=torch.float64)


def test_the_removed_channel_is_the_one_that_raises_the_objective_least() -> None:
    g, e, prior = problem(8)
    ridge, diagonal = 0.3, g.square().sum(0)
    objectives = []
    for gone in range(8):
        rest = [place for place in range(8) if place != gone]
        A = g[:, rest].T @ g[:, rest] + ridge * torch.diag(diagonal[rest])
        w = torch.zeros_like(prior)
        w[rest] = torch.linalg.solve(A, g[:, rest].T @ e + ridge * diagonal[rest, None] * prior[rest])
        objectives.append(float((e - g @ w).square().sum() + ridge * (diagonal[:, None] * (w - prior).square()).sum()))
    kept = best_channels(g.T @ g, g.T @ e, prior, ridge, 7)
    assert kept.tolist() == [place for place in range(8) if place != int(np.argmin(objectives))]


def test_the_channels_of_the_target_are_found() -> None:
    g, _, prior = problem(60, tokens=2000)
    support = torch.arange(5, 60, 4)
    e = g[:, support] @ torch.randn(len(support), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = best_channels((g.T @ g).float(), (g.T @ e).float(), 0 * prior.float(), 1e-3, len(support))
    assert torch.equal(kept, support)


def test_the_choice_does_not_depend_on_units() -> None:
    g, e, prior = problem(30)
    units = torch.logspace(-3, 3, 30, dtype=torch.float64)
    kept = best_channels(g.T @ g, g.T @ e, prior, 0.3, 10)
    scaled = g * units
    assert torch.equal(kept, best_channels(scaled.T @ scaled, scaled.T @ e, prior / units[:, None], 0.3, 10))


def test_uncorrelated_channels_are_screened_as_they_are_chosen() -> None:
    _, _, prior = problem(30)
    g, _ = torch.linalg.qr(problem(30)[0])
    g *= torch.logspace(-2, 2, 30, dtype=torch.float64)
    g[:, 3] = 0
    e = torch.randn(200, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = likely_channels(g.square().sum(0), g.T @ e, prior, 0.3, 12)
    assert torch.equal(found, best_channels(g.T @ g, g.T @ e, prior, 0.3, 12))


def test_channels_that_are_always_zero_are_removed_first() -> None:
    g, e, prior = problem(10)
    g[:, [2, 7]] = 0
    assert best_channels(g.T @ g, g.T @ e, prior, 0.3, 8).tolist() == [0, 1, 3, 4, 5, 6, 8, 9]


def test_sums_that_are_not_finite_are_an_error() -> None:
    g, e, prior = problem(4)
    with pytest.raises(SolveError, match="not finite"):
        best_channels(g.T @ g, torch.full_like(g.T @ e, torch.nan), prior, 0.3, 2)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "granite", "opt", "phi"])
def test_the_sums_equal_a_plain_computation(kind: str, batch_size: int) -> None:
    model, documents = made_model(kind, torch.float64), many_documents(7)
    family, host = family_of(model.config), 2
    layer = family.decoder_layers(model)[host]
    ordered = documents.in_walk_order()
    here, target = passing(model, host, ordered), passing(model, host + 2, ordered)["output"]
    sums = Candidates(host, family, layer, torch.from_numpy(target))
    walk(ModelContext(model, family, documents, batch_size), [sums], description=None)
    w = 1 / np.square(target).sum(1, keepdims=True)
    g = family.multiplier * here["G"]
    bias = getattr(family.linear_of(layer, "mlp_output"), "bias", None)
    e = target - here["middle"] - (0 if bias is None else family.multiplier * bias.detach().numpy())
    assert np.allclose(mirror(sums.gram.clone()).numpy(), (w * g).T @ g, rtol=1e-3, atol=1e-5)
    assert np.allclose(sums.cross.numpy(), (w * g).T @ e, rtol=1e-3, atol=1e-5)
    alone = ScreenedCandidates(host, family, layer, torch.from_numpy(target))
    walk(ModelContext(model, family, documents, batch_size), [alone], description=None)
    assert torch.equal(alone.cross, sums.cross)
    assert np.allclose(alone.gram.numpy(), (w * g * g).sum(0), rtol=1e-3, atol=1e-5)


def test_a_ridge_that_is_too_small_is_named_in_the_error() -> None:
    g = torch.ones(3, 6)
    with pytest.raises(SolveError, match="ridge: 1e-30"):
        best_channels(g.T @ g, g.T @ torch.ones(3, 2), torch.ones(6, 2), 1e-30, 3)


def residual(model: Any, edits: Edits, documents: Documents) -> float:
    """Return the mean squared relative error of the shortened model's state at the cut."""
    shortened = deepcopy(model)
    apply_edits(shortened, family_of(model.config), edits)
    target = passing(model, BLOCK.end - 1, documents)["output"]
    gap = passing(shortened, BLOCK.layer_before_cut, documents)["output"] - target
    return float((np.square(gap).sum(1) / np.square(target).sum(1)).mean())


@pytest.mark.parametrize("kind", ["llama", "opt", "phi"])
def test_the_chosen_channels_fit_better_than_the_layers_own_or_random_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = made_model(kind, torch.float64), many_documents()

    def by_chance(gram: Tensor, *rest: Any) -> Tensor:
        return torch.randperm(len(gram), generator=torch.Generator().manual_seed(0))[: rest[-1]].sort().values

    def own(gram: Tensor, *rest: Any) -> Tensor:
        return torch.arange(rest[-1])  # in the last round the layer's own channels come first

    left = {}
    for name, choice in (("best", best_channels), ("chance", by_chance), ("own", own)):
        monkeypatch.setattr("replaceme.repair.repair.best_channels", choice)
        edits, run_repair = solved(model, documents, (BLOCK,), transform="channels", alpha=5.0, refit_ridge=0.01)
        _, figures = run_repair()
        left[name] = residual(model, edits, documents)
        chosen = edits.channels[BLOCK.layer_before_cut]
        assert {*chosen[:, 0].tolist()} <= {BLOCK.layer_before_cut, *BLOCK.layers}
        assert len(chosen.unique(dim=0)) == len(chosen) == figures["mlp_channels"]
        assert figures["own_mlp_channels"] == int((chosen[:, 0] == BLOCK.layer_before_cut).sum())
    assert figures["own_mlp_channels"] == figures["mlp_channels"]
    assert left["best"] < min(left["chance"], left["own"])


def test_screened_candidates_give_a_choice_nearly_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = made_model("llama", torch.float64), many_documents()
    sizes, left = list[int](), {}

    def counting(gram: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(gram))
        return best_channels(gram, *rest)

    monkeypatch.setattr("replaceme.repair.repair.best_channels", counting)
    for limit in (10**6, 60, 1):
        monkeypatch.setattr("replaceme.repair.channel_choice.CANDIDATE_BYTES", 4 * limit**2)
        edits, run_repair = solved(model, documents, (BLOCK,), transform="channels", alpha=5.0, refit_ridge=0.01)
        run_repair()
        left[limit] = residual(model, edits, documents)
        assert len(edits.channels[BLOCK.layer_before_cut].unique(dim=0)) == 48
    assert {*sizes} == {96, 60, 54}
    assert left[10**6] <= left[60] < 1.1 * left[10**6]


@pytest.mark.parametrize("kind", ["granite", "phi"])
def test_a_later_block_chooses_on_the_shortened_models_activations(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = made_model(kind, torch.float64), many_documents(40)
    blocks, seen = (Block(1, 2), Block(4, 5)), []

    def keeping(gram: Tensor, cross: Tensor, *rest: Any) -> Tensor:
        seen.append((gram.clone(), cross.clone(), deepcopy(edits)))
        return best_channels(gram, cross, *rest)

    monkeypatch.setattr("replaceme.repair.repair.best_channels", keeping)
    edits, run_repair = solved(model, documents, blocks, transform="channels", alpha=5.0, repair=True)
    run_repair()
    gram, cross, by_then = seen[1]
    family, host = family_of(model.config), blocks[1].layer_before_cut
    few = Documents(few_documents(documents, 8 * 2 * 48).in_walk_order().documents)
    target = passing(model, blocks[1].end - 1, few)["output"]
    with unfused(model, family, by_then):
        now = passing(model, host, few)
    bias = getattr(family.linear_of(family.decoder_layers(model)[host], "mlp_output"), "bias", None)
    e = target - now["middle"] - (0 if bias is None else family.multiplier * bias.detach().numpy())
    g, w = family.multiplier * now["G"], 1 / np.square(target).sum(1, keepdims=True)
    assert by_then.removed_layers == [1, 4]
    assert np.allclose(mirror(gram).numpy(), (w * g).T @ g, rtol=1e-3, atol=1e-5)
    assert np.allclose(cross.numpy(), (w * g).T @ e, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "blocks", "options"),
    [
        ("llama", (Block(1, 2),), {}),  # the first layer is the host
        ("llama", (Block(4, 6),), {"repair": True}),  # no layer is left after the cut
        *((kind, (Block(1, 2), Block(3, 5)), {"repair": True}) for kind in FOLDING),
    ],
)
def test_channels_and_repair_are_exported_exactly(
    kind: str, blocks: tuple[Block, ...], options: dict[str, Any], save_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    source, documents = save_tiny(kind), many_documents(12)
    edits, run_repair = solved(source.load(), documents, blocks, alpha=1.0, transform="channels", **options)
    run_repair()
    assert set(edits.channels) == {block.layer_before_cut for block in blocks}
    save_pruned(source, edits, tmp_path)
    figures = verify_export(source, Model(tmp_path, "pruned"), edits, documents)
    assert figures["hidden_error_mean"] < figures["tolerance"]


def test_settings_and_families_without_channels_are_refused() -> None:
    values = read_params(None, {"transform": "channels"}, methods=METHODS).model_dump()
    assert refusals({**values, "use_4bit": True}, METHODS["lstsq"]) == [
        "use_4bit: transform channels puts rows of several layers' weights together, and 4-bit ones are packed; use false."
    ]
    assert not refusals(values, METHODS["lstsq"])
    for model in ("falcon", made_model("opt", enable_bias=False)):
        (sentence,) = model_refusals(model, transform="channels")
        assert sentence.startswith("transform: channels folds the norm before an MLP into its linears")
    (sentence,) = refusals({**values, "method": "cosine"}, METHODS["cosine"])
    assert sentence.startswith("transform: channels solves least squares")
