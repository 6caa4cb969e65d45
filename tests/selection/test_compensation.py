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
from replaceme.base.files import read_json
from replaceme.base.parameters import Params, read_params
from replaceme.base.plan import Block, Plan, load_blocks, save_blocks
from replaceme.cli import commands
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.edits.unfused import unfused
from replaceme.export.card import render_card
from replaceme.export.save import save_pruned
from replaceme.export.verification import find_wrong_weights, verify_export
from replaceme.methods.registry import METHODS, criterion_of
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, family_of
from replaceme.models.model import Model
from replaceme.models.recognition import recognise_family
from replaceme.repair.repair import repair_layers
from replaceme.selection.compensation import blocks_of, check_scale, compensated_layers, scale_blocks, scaling_edits
from replaceme.selection.cut_loss import cut_losses
from tests.conftest import KINDS, LAYERS, OBSTACLES, PLAIN, UNDESCRIBED, made_model
from tests.helpers import TEXT, call, context_of, loss_without, many_documents, means, norm_in_float64, shortened_logits
from tests.methods.helpers import model_refusals

SCALABLE = [kind for kind in KINDS if not kind.startswith("olmo")]


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
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(TEXT, use_cache=False).logits
    return logits


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
        check_scale(model, recognise_family(model), documents)
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
        check_scale(model, family, documents)


def test_blocks_and_plan_keep_scalars_to_the_last_bit_and_say_nothing_without(tmp_path: Path) -> None:
    blocks = (Block(1, 3, scale=1 / 3), Block(4, 5))
    save_blocks(blocks, tmp_path / "blocks.json")
    assert load_blocks(tmp_path / "blocks.json") == blocks
    assert read_json(tmp_path / "blocks.json") == [{"start": 1, "end": 3, "scale": 1 / 3}, {"start": 4, "end": 5}]
    Plan(blocks, ()).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").scales == {0: 1 / 3}


@pytest.mark.parametrize("kind", PLAIN)
def test_repair_follows_scalars(kind: str, save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source, texts = save_tiny(kind), many_documents(12)
    if not source.family().norm_before:
        return
    params = read_params(None, {"method": "prune_and_comp", "repair": True, "batch_size": 4})
    model = source.load()
    plan = Plan(tuple(scale_blocks(ModelContext(model, source.family(), texts, 4), [Block(1, 2), Block(3, 5)])), ())
    edits = scaling_edits(plan.blocks)
    repairs, _ = repair_layers(params, ModelContext(model, source.family(), texts, params.batch_size), edits, plan)
    assert repairs
    assert all(each.after < each.before for each in repairs)
    save_pruned(source, edits, tmp_path)
    figures = verify_export(source, Model(tmp_path, "pruned"), edits, texts)
    assert figures["hidden_error_mean"] < figures["tolerance"]


@pytest.mark.parametrize("options", [{}, {"selection": "angular", "num_A": 2, "layers_to_skip": 1}, {"selection": "loss"}])
def test_the_whole_command_scales_what_is_left(
    options: dict[str, Any],
    save_tiny: Callable[..., Model],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = save_tiny()
    values = {
        "method": "prune_and_comp", "model": source.folder, "dataset": text_file, "dataset_size": 20, "max_length": 48,
        "dtype": "float32", "layers_to_skip": 3, "tasks": f"[{text_file}]", "eval_tokens": 200, "threads": 1,
        "save_path": tmp_path / "pruned", **options,
    }  # fmt: skip
    call(commands.run_replaceme, *(part for key, value in values.items() for part in (f"--{key}", value)))
    said, work = capsys.readouterr().err, tmp_path / "pruned.work"
    blocks = load_blocks(work / "artifacts" / "blocks.json")
    edits = Edits.load(work / "artifacts" / "edits")
    assert {host: float(P) for host, P in edits.operators.items()} == {block.layer_before_cut: block.scale for block in blocks}
    figures = read_json(work / "metrics" / "select.json")
    assert figures["scale"] == pytest.approx(blocks[0].scale, rel=1e-5)
    for block in blocks:
        assert f"{block.scale:.4f} after layer {block.layer_before_cut}" in said
    if not options:
        assert len(figures["order"]) == 3
        product = torch.tensor([each["scale"] for each in figures["order"].values()]).prod()
        assert product == pytest.approx(float(torch.tensor([block.scale for block in blocks]).prod()), rel=1e-4)
    dense, loaded = source.load(), Model(tmp_path / "pruned", "pruned").load()
    assert loaded.config.num_hidden_layers == LAYERS - sum(map(len, blocks))
    assert find_wrong_weights(dense, loaded, source.family(), edits)[0] == []
    assert torch.allclose(logits_of(loaded), shortened_logits(dense, edits, TEXT), rtol=1e-3, atol=1e-3)
    card = (tmp_path / "pruned" / "README.md").read_text(encoding="utf-8")
    assert "with Prune&Comp." in card
    assert f"by {1 / float(blocks[0].scale or 0):.4g} after layer {blocks[0].layer_before_cut}" in card
    page = (work / "artifacts" / "report" / "index.html").read_text(encoding="utf-8")
    assert options or "the smallest block influence, one layer at a time" in page


def test_the_card_of_another_method_has_no_scalars(params: Params, tiny: Model) -> None:
    assert "magnitude" not in render_card(params, tiny, Edits("test", [2, 3]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"transform": "joint"},
            "transform: joint has no place in method prune_and_comp, which replaces removed layers by a scalar; use dense.",
        ),
        (
            {"method": "uidl", "selection": "compensated"},
            "selection: 'compensated' is not a criterion; use one of angular, residual, loss, influence, greedy.",
        ),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError) as caught:
        read_params(None, {"method": "prune_and_comp", **options}, METHODS)
    (problem,) = caught.value.problems
    assert problem.startswith(f"command line: {said}")


def test_families_that_see_the_scale_of_the_stream_are_refused_before_any_work() -> None:
    for kind in KINDS:
        refused = model_refusals(kind, method="prune_and_comp")
        assert bool(refused) == kind.startswith("olmo"), kind
        assert not refused or refused[0].startswith("method: prune_and_comp scales the residual stream, and not all that reads")
    assert model_refusals(OBSTACLES["undescribed"], method="prune_and_comp") == []
    assert not family_of(made_model("opt", _remove_final_layer_norm=True).config).norm_before
    assert model_refusals(Family(norm_offset=0.0, norm_before=False), method="uidl") == []


def test_the_method_has_a_criterion_of_its_own_unless_selection_says_otherwise() -> None:
    assert criterion_of(read_params(None, {"method": "prune_and_comp"}, METHODS)).name == "compensated"
    assert criterion_of(read_params(None, {"method": "prune_and_comp", "selection": "angular"}, METHODS)).name == "angular"
