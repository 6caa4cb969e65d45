"""Prune&Comp: the removed layers and their scalars, against plain loops and the published fold."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from replaceme.base.documents import Documents, split_documents
from replaceme.base.errors import ModelError, ParameterError
from replaceme.base.plan import Block, Plan
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.edits.unfused import unfused
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, family_of
from replaceme.models.model import Model
from replaceme.models.recognition import recognise_family
from replaceme.selection.compensation import (
    blocks_of,
    compensated_layers,
    require_scalable,
    scale_blocks,
    scaling_edits,
)
from replaceme.selection.cut_loss import cut_losses
from tests.conftest import KINDS, LAYERS, OBSTACLES, PLAIN_REPRESENTATIVES, REPRESENTATIVES, UNDESCRIBED, made_model
from tests.helpers import TEXT, context_of, logits_of, loss_without, many_documents, means, norm_in_float64, shortened_logits
from tests.methods.helpers import assert_repaired_and_exported, model_refusals

SCALABLE = [kind for kind in REPRESENTATIVES if not kind.startswith("olmo")]


@torch.no_grad()
def passed(model: Any, documents: Documents, gone: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Run the layers in order, with a scalar in the place of each removed one.

    Returns:
        Σ|h| of each layer's input and of its output, (layers, d) each, and the mean of 1 − cosine of the two.
    """
    layers = family_of(model.config).decoder_layers(model)
    before, after = (torch.zeros(LAYERS, model.config.hidden_size, dtype=torch.float64) for _ in range(2))
    far = [0.0] * LAYERS
    for document in documents.documents:
        calls: dict[int, Any] = {}

        hooks = [layer.register_forward_pre_hook(noting(calls, index), with_kwargs=True) for index, layer in enumerate(layers)]
        model(document[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        args, kwargs = calls[0]
        state = args[0] if args else kwargs["hidden_states"]
        for index, layer in enumerate(layers):
            if index in gone:
                state = state * gone[index]
                continue
            args, kwargs = calls[index]
            output = layer(state, *args[1:], **kwargs) if args else layer(**{**kwargs, "hidden_states": state})
            output = output[0] if isinstance(output, tuple) else output
            before[index] += state.abs().sum(dim=(0, 1))
            after[index] += output.abs().sum(dim=(0, 1))
            far[index] += float((1 - torch.cosine_similarity(state, output, dim=-1)).sum())
            state = output
    return before, after, [total / documents.token_count for total in far]


def noting(calls: dict[int, Any], index: int) -> Any:
    def hook(_module: Any, args: Any, kwargs: Any) -> None:
        calls[index] = args, kwargs

    return hook


def chosen(model: Any, documents: Documents, allowed: Sequence[int], count: int) -> dict[int, float]:
    """Return the removed layers in order, with their scalars."""
    gone: dict[int, float] = {}
    for _ in range(count):
        before, after, far = passed(model, documents, gone)
        best = min((layer for layer in allowed if layer not in gone), key=far.__getitem__)
        gone[best] = float((after[best] / before[best]).mean())
    return gone


def float64(kind: str) -> Any:
    model = made_model(kind, torch.float64)
    if family_of(model.config).norm_after_mlp:
        norm_in_float64(model, family_of(model.config))
    return model


@torch.no_grad()
def loss_of(model: Any, documents: Documents) -> float:
    texts = documents.documents
    losses = [float(model(text[None], labels=text[None], use_cache=False).loss) * (len(text) - 1) for text in texts]
    return sum(losses) / sum(len(text) - 1 for text in texts)


@pytest.mark.parametrize("kind", SCALABLE)
def test_layers_and_scalars_are_those_of_a_plain_loop_and_fold(kind: str, documents: Documents) -> None:
    model = float64(kind)
    family, before = family_of(model.config), {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = chosen(model, documents, range(1, LAYERS), 3)
    scales, influences = compensated_layers(ModelContext(model, family, documents, 4), range(1, LAYERS), 3)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert [*scales] == [*expected]
    assert [*scales.values()] == pytest.approx([*expected.values()], rel=1e-5)
    assert [*influences] == [*scales]
    edits = scaling_edits(blocks_of(scales))
    plain = shortened_logits(model, edits, TEXT)
    with unfused(model, family, edits):
        hooked = logits_of(model)
    apply_edits(model, family, edits)
    assert (hooked - plain).norm() / plain.norm() < 1e-9
    # The epsilon of a norm makes it depend slightly on the scale of the state.
    assert (logits_of(model) - plain).norm() / plain.norm() < 1e-4


def test_the_result_equals_the_published_fold_into_the_earlier_weights(documents: Documents) -> None:
    model = made_model("llama", torch.float64, tie_word_embeddings=False)
    published, family = deepcopy(model), family_of(model.config)
    kept, expected = list(range(LAYERS)), {}
    for _ in range(3):
        layers = published.model.layers
        pairs: list[list[Any]] = [[] for _ in layers]
        hooks = [
            layer.register_forward_hook(lambda _module, args, output, kept=kept: kept.append((args[0][0], output[0])))
            for layer, kept in zip(layers, pairs, strict=True)
        ]
        with torch.no_grad():
            for document in documents.documents:
                published(document[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        states = [[torch.cat(parts) for parts in zip(*kept, strict=True)] for kept in pairs]
        far = {n: float((1 - torch.cosine_similarity(*pair, dim=-1)).mean()) for n, pair in enumerate(states) if n}
        best = min(far, key=far.__getitem__)
        entering, leaving = (state.abs().mean(dim=0) for state in states[best])
        scale = float((leaving / entering).mean())
        with torch.no_grad():
            published.model.embed_tokens.weight *= scale
            for layer in layers[:best]:
                for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    linear.weight *= scale
                    linear.bias *= scale
        published.model.layers = nn.ModuleList([layer for n, layer in enumerate(layers) if n != best])
        expected[kept.pop(best)] = scale
    scales, _ = compensated_layers(ModelContext(model, family, documents, 4), range(1, LAYERS), 3)
    assert [*scales] == [*expected]
    assert [*scales.values()] == pytest.approx([*expected.values()], rel=1e-4)
    apply_edits(model, family, scaling_edits(blocks_of(scales)))
    wanted = logits_of(published)
    assert (logits_of(model) - wanted).norm() / wanted.norm() < 1e-4


@pytest.mark.parametrize("factors", [{3: 1.7}, {2: 0.6, 4: 1.7}, {3: 1.7, 4: 1.3}])
def test_layers_that_only_scale_go_first_and_the_function_is_unchanged(factors: dict[int, float], documents: Documents) -> None:
    model = made_model("llama", torch.float64)
    for index, factor in factors.items():
        model.model.layers[index].forward = lambda hidden_states, *_args, factor=factor, **_options: factor * hidden_states
    family, dense = family_of(model.config), logits_of(model)
    scales, influences = compensated_layers(ModelContext(model, family, documents, 4), range(1, LAYERS), len(factors))
    assert scales == pytest.approx(factors, rel=1e-9)
    assert [*influences.values()] == pytest.approx([0.0] * len(factors), abs=1e-6)
    blocks = blocks_of(scales)
    assert [block.layers for block in blocks] == (
        [range(3, 5)] if len(blocks) == 1 and len(factors) == 2 else [range(index, index + 1) for index in factors]
    )
    dropped = deepcopy(model)
    apply_edits(dropped, family, Edits("", [*factors]))
    apply_edits(model, family, scaling_edits(blocks))
    assert (logits_of(model) - dense).norm() / dense.norm() < 1e-5
    assert (logits_of(dropped) - dense).norm() / dense.norm() > 1e-2


def test_scalars_of_chosen_blocks_are_measured_one_after_the_other(documents: Documents) -> None:
    model = made_model("llama", torch.float64)
    first, second = scale_blocks(context_of(model, documents), [Block(1, 3), Block(4, 5)])
    before, after, _ = passed(model, documents, {})
    one = float((after[2] / before[1]).mean())
    before, after, _ = passed(model, documents, {1: one, 2: 1.0})
    two = float((after[4] / before[4]).mean())
    assert (first.scale, second.scale) == (pytest.approx(one, rel=1e-9), pytest.approx(two, rel=1e-9))
    assert (len(first), len(second)) == (2, 1)


def test_a_channel_of_zeros_has_no_gain(documents: Documents) -> None:
    model = made_model("llama", torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 0
        for linear in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            linear.weight[5] = 0
            linear.bias[5] = 0
    (block,) = scale_blocks(context_of(model, documents), [Block(1, 2)])
    before, after, _ = passed(model, documents, {})
    there = torch.arange(before.shape[1]) != 5
    assert block.scale == pytest.approx(float((after[1] / before[1])[there].mean()))


def test_cuts_are_compared_by_the_loss_with_their_scalars() -> None:
    texts = many_documents(12)
    model, blocks = made_model(), [Block(1, 3), Block(3, 5)]
    family, (fit, held_out) = family_of(model.config), split_documents(texts)
    losses = means(cut_losses(ModelContext(model, family, texts, 4), blocks, "scalar"))
    for block, loss in zip(blocks, losses, strict=True):
        (there,) = scale_blocks(ModelContext(model, family, fit, 4), [block])
        with unfused(model, family, scaling_edits([there])):
            expected = loss_of(model, held_out)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert loss != pytest.approx(loss_without("llama", [*block.layers], held_out), rel=1e-5)


def test_states_that_overflow_are_named(documents: Documents) -> None:
    model = made_model()
    model.model.layers[3].forward = lambda hidden_states, *_args, **_options: float("inf") * hidden_states
    said = "dtype: the states of the shortened model overflow; use bfloat16 or float32"
    with pytest.raises(ParameterError, match=said):
        scale_blocks(context_of(model, documents), [Block(3, 4)])
    with pytest.raises(ParameterError, match=said):
        compensated_layers(context_of(model, documents), [1, 2], 1)


@pytest.mark.parametrize("kind", UNDESCRIBED)
def test_a_scalar_is_known_to_fold_in_undescribed_families(kind: str, documents: Documents) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = made_model(kind, dtype, **UNDESCRIBED[kind])
        require_scalable(ModelContext(model, recognise_family(model), documents, 4))
        assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("part", ["input_layernorm", "post_attention_layernorm", "norm"])
def test_a_part_that_sees_the_scale_of_the_stream_is_refused(part: str, documents: Documents) -> None:
    model = made_model()
    family = recognise_family(model)
    if part == "norm":
        model.model.norm = nn.Identity()
    else:
        for layer in model.model.layers:
            setattr(layer, part, nn.Identity())
    with pytest.raises(ModelError, match="model_path: the layers of the family 'llama' depend on the scale of the residual"):
        require_scalable(ModelContext(model, family, documents, 4))


@pytest.mark.parametrize("kind", PLAIN_REPRESENTATIVES)
def test_repair_follows_scalars(kind: str, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source = save_tiny(kind)
    if source.family().norm_before:
        context = context_of(source.load(), many_documents(12))
        plan = Plan(tuple(scale_blocks(context, [Block(1, 2), Block(3, 5)])), ())
        assert_repaired_and_exported(source, scaling_edits(plan.blocks), plan, tmp_path, "prune_and_comp")


def test_families_that_see_the_scale_of_the_stream_are_refused_before_any_work() -> None:
    for kind in KINDS:
        refused = model_refusals(kind, method="prune_and_comp")
        assert bool(refused) == kind.startswith("olmo"), kind
        assert not refused or refused[0].startswith("method: prune_and_comp scales the residual stream, and not all that reads")
    assert model_refusals(OBSTACLES["undescribed"], method="prune_and_comp") == []
    assert not family_of(made_model("opt", _remove_final_layer_norm=True).config).norm_before
    assert model_refusals(Family(norm_offset=0.0, norm_before=False), method="uidl") == []
