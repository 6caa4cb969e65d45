"""The residual of every cut, and the loss of a few, against plain computations."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from replaceme.base import scratch
from replaceme.base.documents import EXCERPT_LENGTH, EXCERPT_TOKENS, Documents, excerpts_of, split_documents
from replaceme.base.errors import ParameterError, ResourceError
from replaceme.base.group import WHOLE
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.methods.registry import METHODS
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, Linear, family_of
from replaceme.selection import cut_loss
from replaceme.selection.cut_loss import DerivedGram, cut_losses, dense_losses, feature_gram
from replaceme.statistics.cut_statistics import FeatureGram, take_statistics
from replaceme.statistics.features import LINEARS, Features
from replaceme.statistics.profile import profile_model
from replaceme.statistics.residuals import RIDGE, TokenSample, choose_tokens, residual_map
from replaceme.statistics.sums import token_weights
from replaceme.statistics.walk import walk
from tests.conftest import LAYERS, PLAIN_REPRESENTATIVES, REPRESENTATIVES, WIDTH, made_model
from tests.helpers import context_of, mean_loss, means


def made_documents(count: int, seed: int = 0) -> Documents:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 60, (count,), generator=generator).tolist()
    return Documents([torch.randint(2, 400, (length,), generator=generator) for length in lengths])


def states(
    model: torch.nn.Module, documents: Documents, family: Family | None = None
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return what each layer's MLP adds and the output of each layer, (tokens, d) each, in the order of a walk."""
    family = family or Family()
    added: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    output: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    hooks = []
    for index, layer in enumerate(model.model.layers):
        end = family.transformed(layer)
        hooks.append(end.register_forward_hook(lambda _m, _a, out, kept=added[index]: kept.append(out[0])))
        hooks.append(layer.register_forward_hook(lambda _m, _a, out, kept=output[index]: kept.append(out[0])))
    with torch.no_grad():
        for document in sorted(documents.documents, key=len, reverse=True):
            model(document[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(part).double().numpy() for part in added], [torch.cat(part).double().numpy() for part in output]


@pytest.mark.parametrize(
    ("batch_size", "count"), [(1, 12), (4, 12), (1, 1)], ids=["", "batches", "fewer tokens than dimensions"]
)
def test_the_map_equals_a_direct_computation_for_sampled_pairs(batch_size: int, count: int, tmp_path: Path) -> None:
    model, documents = made_model(dtype=torch.float64), made_documents(count)
    with TokenSample(documents, LAYERS, WIDTH, torch.float64, tmp_path) as sample:
        walk(context_of(model, documents, batch_size), [sample], description="test")
        found = residual_map(sample, "cpu")
        tokens = torch.cat([sample.fit, sample.held_out]).numpy()
        fit = np.arange(len(tokens)) < len(sample.fit)
        assert list(tmp_path.iterdir()) == []
        assert (len(sample.fit) < WIDTH) == (count == 1)
    added, output = states(model, documents)
    for host, last in [(0, 1), (0, LAYERS - 1), (2, 4), (LAYERS - 2, LAYERS - 1)]:
        M, Z, H = added[host][tokens], (output[host] - added[host])[tokens], output[last][tokens]
        w = 1 / np.square(H).sum(1)
        gram = (M[fit].T * w[fit]) @ M[fit]
        T = np.linalg.solve(gram + RIDGE * np.trace(gram) / WIDTH * np.eye(WIDTH), (M[fit].T * w[fit]) @ (H - Z)[fit])
        error = (H - Z - M @ T)[~fit]
        assert found[host][last] == pytest.approx(np.sqrt((np.square(error).sum(1) * w[~fit]).mean()), rel=1e-3)
        assert found[last][host] == 0


def test_held_out_tokens_come_from_other_texts_than_the_fits() -> None:
    documents = Documents(made_documents(40).documents, [number // 4 for number in range(40)])
    fit, held = choose_tokens(documents, 200)
    ordered = documents.in_walk_order()
    ends = torch.tensor([len(document) for document in ordered.documents]).cumsum(0)
    owners = [{ordered.sources[place] for place in torch.searchsorted(ends, tokens, right=True)} for tokens in (fit, held)]
    assert all(owners)
    assert not owners[0] & owners[1]


def test_pieces_of_a_single_text_are_split_by_token() -> None:
    fit, held_out = choose_tokens(Documents(made_documents(9).documents, [0] * 9), 10_000)
    assert fit.max() < held_out.min()


def test_a_layer_that_a_map_can_stand_for_has_no_residual() -> None:
    model, documents = made_model(attention_bias=False, mlp_bias=False), made_documents(12)
    with torch.no_grad():  # layers 3 and 4 do nothing: the identity is the map
        for layer in (3, 4):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    found = profile_model(context_of(model, documents))["residual"]
    assert found[2][4] < 0.01
    assert found[2][5] > 0.05


def test_a_scratch_disk_that_is_too_small_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    sample = TokenSample(made_documents(6), LAYERS, WIDTH, torch.float32, tmp_path)
    with pytest.raises(ResourceError, match="profiling keeps 0 MiB of states there"), sample:
        pass


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "olmo2"])
def test_the_loss_of_a_cut_is_that_of_the_model_with_its_fold(family: str) -> None:
    model, documents, block = made_model(family), made_documents(12), Block(2, 4)
    description = family_of(model.config)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    dense = dense_losses(context_of(model, documents)).mean
    (fitted,) = means(cut_losses(ModelContext(model, description, documents, 4), [block], "map"))
    (bare,) = means(cut_losses(ModelContext(model, description, documents, 4), [block], "nothing"))
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    kept, held_out = split_documents(documents)
    assert dense == pytest.approx(mean_loss(model, held_out), rel=1e-5)
    added, output = states(model, kept, description)
    M, Z, H = added[1], output[1] - added[1], output[3]
    w = 1 / np.square(H).sum(1)
    gram = (M.T * w) @ M
    T = torch.from_numpy(np.linalg.solve(gram + RIDGE * np.trace(gram) / WIDTH * np.eye(WIDTH), (M.T * w) @ (H - Z)))
    for found, transforms in ((fitted, {1: T}), (bare, {})):
        pruned = deepcopy(model)
        if transforms and description.norm_after_mlp:  # a dense map after a norm can't be folded
            end, transforms = description.transformed(description.decoder_layers(pruned)[1]), {}
            end.register_forward_hook(lambda _m, _a, out: (out.to(T) @ T).to(out.dtype))
        apply_edits(pruned, description, Edits("test", [2, 3], transforms))
        assert found == pytest.approx(mean_loss(pruned, held_out), rel=1e-3)


@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_the_loss_of_a_cut_is_that_of_the_model_without_its_layers(kind: str) -> None:
    model, documents, blocks = made_model(kind), made_documents(12), [Block(2, 4), Block(3, 4)]
    description, computed = family_of(model.config), []
    front = description.decoder_layers(model)[0].get_submodule(description.attention)
    front.register_forward_hook(lambda *_: computed.append(None))
    losses = means(cut_losses(ModelContext(model, description, documents, 4), blocks, "nothing"))
    _, held_out = split_documents(documents)
    # The layers before all cuts are computed once.
    assert len(computed) == held_out.batch_count(4, WHOLE)
    for found, block in zip(losses, blocks, strict=True):
        pruned = deepcopy(model)
        apply_edits(pruned, description, Edits("test", [*block.layers]))
        assert found == pytest.approx(mean_loss(pruned, held_out), rel=1e-4)


def test_the_loss_needs_documents_to_hold_out() -> None:
    one_text = Documents([torch.arange(9)] * 6, [0] * 6)
    for documents in (made_documents(4), Documents([torch.tensor([5])] * 6), one_text):
        with pytest.raises(ParameterError, match="selection: loss holds out every 5th text"):
            dense_losses(context_of(made_model(), documents, 1))
        with pytest.raises(ParameterError, match="selection: loss holds out every 5th text"):
            cut_losses(context_of(made_model(), documents, 1), [Block(2, 3)], "map")


def test_many_documents_are_not_cut_short_for_the_loss() -> None:
    short = Documents([torch.arange(2, 42)] * 900)
    excerpts = excerpts_of(short)
    assert {len(document) for document in excerpts.documents} <= {40, EXCERPT_TOKENS % 40}
    assert EXCERPT_TOKENS - 40 < excerpts.token_count <= EXCERPT_TOKENS
    long = excerpts_of(Documents([torch.arange(3000)] * 9))
    assert [len(document) for document in long.documents] == [EXCERPT_LENGTH] * 4


@pytest.mark.parametrize("lengths", [[2], [1, 1], [3], [1, 1, 1, 1, 1, 1]])
def test_hardly_any_text_still_gives_numbers(lengths: list[int]) -> None:
    documents = Documents([torch.arange(5, 5 + length) for length in lengths])
    found = profile_model(context_of(made_model(), documents, 2))["residual"]
    assert all(np.isfinite(row).all() for row in found)


def test_a_state_of_zeros_weighs_nothing() -> None:
    assert token_weights(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0.0], [pytest.approx(0.04)]]


@pytest.mark.parametrize(("transform", "statistic"), [("refit", "mlp_features"), ("joint", "features")])
@pytest.mark.parametrize("bytes_at_once", [4 << 30, 1])
def test_the_loss_of_new_weights_is_that_of_the_edits_of_the_method(
    bytes_at_once: int, transform: str, statistic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut_loss, "GRAM_BYTES", bytes_at_once)
    model, documents, blocks = made_model(dtype=torch.float64), made_documents(12), [Block(2, 4), Block(1, 3)]
    found = means(cut_losses(context_of(model, documents), blocks, transform))  # type: ignore[arg-type]
    kept, held_out = split_documents(documents)
    for loss, block in zip(found, blocks, strict=True):
        sums = take_statistics(context_of(model, kept), block, [statistic])[statistic]
        params = read_params(None, {"transform": transform, "alpha": RIDGE * float(sums["added_gram"].diagonal().mean())})
        edits = METHODS["lstsq"].solve(params, block, lambda _, sums=sums: sums).edits  # type: ignore[misc]
        edits.removed_layers = [*block.layers]
        pruned = deepcopy(model)
        apply_edits(pruned, Family(), edits)
        assert loss == pytest.approx(mean_loss(pruned, held_out), rel=1e-5)


@pytest.mark.parametrize("linears", [("mlp_output",), LINEARS])
@pytest.mark.parametrize("kind", PLAIN_REPRESENTATIVES)
def test_what_the_mlp_adds_is_known_from_its_features(kind: str, linears: tuple[Linear, ...]) -> None:
    model, documents, block = made_model(kind, torch.float64), made_documents(8), Block(2, 4)
    family = family_of(model.config)
    host = family.decoder_layers(model)[block.layer_before_cut]
    features, last = Features.of(host, family, linears), family.linear_of(host, "mlp_output")
    found, expected = feature_gram(block, features, last), FeatureGram(block, features)
    assert isinstance(found, DerivedGram)
    walk(ModelContext(model, family, documents, 4), [found, expected], description=None)
    sums = found.tensors()
    for name, total in expected.tensors().items():
        assert torch.allclose(sums[name], total, rtol=1e-5, atol=1e-6 * float(total.abs().max()))


def test_where_weights_cannot_be_read_what_the_mlp_adds_is_watched() -> None:
    features = Features({"mlp_output": 8}, None)
    offloaded, packed = nn.Linear(8, 4, bias=False, device="meta"), nn.Linear(8, 4, bias=False)
    packed.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    assert [type(feature_gram(Block(2, 4), features, each)) for each in (offloaded, packed)] == [FeatureGram] * 2
