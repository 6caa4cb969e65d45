"""LLM-Streamline: the choice of the window, and the training of one layer, against loops of plain torch."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from replaceme.base import checkpoints
from replaceme.base.documents import Documents, split_indices
from replaceme.base.errors import SolveError
from replaceme.base.files import read_json
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, load_blocks
from replaceme.edits.edits import Edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import measure_cache_error, verify_export
from replaceme.methods import llm_streamline
from replaceme.methods.llm_streamline import (
    LayerDistillation,
    LearningRateSchedule,
    TrainedLayer,
    record_entry_and_exit,
    shuffled_batches,
    train_layer,
)
from replaceme.models.context import ModelContext
from replaceme.models.families import FAMILIES, Family, family_of, parameter_of
from replaceme.models.kv_cache import cache_bytes_per_token
from replaceme.models.model import Model
from replaceme.models.own_form import is_own_form
from replaceme.running.workspace import Workspace
from replaceme.statistics.profile import profile_model
from replaceme.training.training import train
from tests.conftest import LAYERS, OBSTACLES, REPRESENTATIVES, made_model
from tests.helpers import TEXT, context_of, hooked_and_folded, layer_outputs, many_documents, shortened_logits
from tests.interruption import InterruptedRunError, counted, stop_at
from tests.methods.helpers import method_context, model_refusals, run_stages

TRAINED, END = 1, 4
RATE = "llm_streamline_learning_rate"
SOLVED = ("inputs", "calibrate", "profile", "select", "plan", "activations", "solve")
# Families whose layers can be left without their attention.
APART = [kind for kind in REPRESENTATIVES if not model_refusals(kind, method="llm_streamline", llm_streamline_form="mlp")]


def distillation_of(model: Any, documents: Documents) -> LayerDistillation:
    """Return what a layer learns: from the states that enter it to those that leave the last layer of the block."""
    family = family_of(model.config)
    states = record_entry_and_exit(ModelContext(model, family, documents, 4), TRAINED, END - 1)
    return LayerDistillation(ModelContext(model, family, documents, 4), TRAINED, *states)


def trained(model: Any, documents: Documents, schedule: LearningRateSchedule, folder: Path, key: str = "key") -> Any:
    return trained_on(distillation_of(model, documents), schedule, folder, key)


def trained_on(distillation: LayerDistillation, schedule: LearningRateSchedule, folder: Path, key: str = "") -> Any:
    """Return the trained parameters, and the curves."""
    parameters, plan = distillation.trainable_parameters(), schedule.plan(distillation.documents.in_walk_order().sources)
    return parameters, train(distillation, parameters, plan, folder, key)[0]


def trained_by(source: Model, documents: Documents, folder: Path, **options: Any) -> tuple[Edits, TrainedLayer]:
    """Return the edits of the method, as they are saved and read again."""
    output = folder / "edits"
    output.mkdir(exist_ok=True)
    options = {"method": "llm_streamline", "dtype": "float32", "device": "cpu", "threads": 1, **options}
    context = method_context(source.load(), documents, folder, (Block(TRAINED + 1, END),), **options)
    train_layer(replace(context, output=output))
    context.edits.save(output)
    edits = Edits.load(output)
    assert isinstance(edits.model_edit, TrainedLayer)
    return edits, edits.model_edit


@torch.no_grad()
def expected_logits(source: Model, edits: Edits) -> Tensor:
    """Return the logits of the shortened model with the trained weights put into its layer, whose attention may be gone."""
    model, edit = source.load(), edits.model_edit
    assert isinstance(edit, TrainedLayer)
    layer = source.family().decoder_layers(model)[edit.layer]
    for name, value in edit.parameters.items():
        parameter_of(layer, name).copy_(value)
    if edit.without:
        layer.get_submodule(edit.without[0]).register_forward_hook(lambda _m, _a, out: (torch.zeros_like(out[0]), *out[1:]))
    return shortened_logits(model, Edits("", edits.removed_layers), TEXT)


def layer_called(model: Any, layer: int, ids: Tensor) -> tuple[Any, Any, Tensor]:
    """Return the arguments of a whole model's call of a layer on one text, and its output."""
    kept: list[Any] = []
    kind = model.config.model_type.removeprefix("pruned_")
    module = FAMILIES[kind](model.config).decoder_layers(model)[layer]
    hook = module.register_forward_hook(lambda _m, args, kwargs, out: kept.append((args, kwargs, out)), with_kwargs=True)
    with torch.no_grad():
        model(ids[None], use_cache=False)
    hook.remove()
    args, kwargs, output = kept[0]
    return args, kwargs, output if isinstance(output, Tensor) else output[0]


def by_hand(model: Any, documents: Documents, schedule: LearningRateSchedule) -> Any:
    """Train a copy of the layer by a plain loop: one document after the other, no padding, torch's own AdamW."""
    texts = documents.in_walk_order().documents
    layer = deepcopy(family_of(model.config).decoder_layers(model)[TRAINED]).float()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=schedule.learning_rate, weight_decay=1e-3)
    steps = schedule.epochs * -(-len(texts) // schedule.batch_size)
    step = 0
    for epoch in range(schedule.epochs):
        for batch in shuffled_batches(range(len(texts)), epoch, schedule.batch_size):
            error, count = torch.zeros(()), 0
            for index in batch:
                args, kwargs, _ = layer_called(model, TRAINED, texts[index])
                target = layer_called(model, END - 1, texts[index])[2]
                output = layer(*args, **kwargs)
                output = output if isinstance(output, Tensor) else output[0]
                error, count = error + (output - target).square().sum(), count + target.numel()
            optimizer.zero_grad()
            (error / count).backward()
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 5.0)
            optimizer.param_groups[0]["lr"] = schedule.rate(step, steps)
            optimizer.step()
            step += 1
    return layer


def test_mean_cosines_equal_a_plain_reference_and_padding_changes_nothing(documents: Documents) -> None:
    model = made_model()
    found = profile_model(context_of(model, documents))["mean_cosine"]
    states = [
        torch.cat(parts).double() for parts in zip(*(layer_outputs(model, each) for each in documents.documents), strict=True)
    ]
    for first in range(LAYERS):
        for last in range(LAYERS):
            # What enters layer 0 is the embedding.
            cosine = torch.cosine_similarity(states[first], states[last + 1]).mean() if last >= first else 0.0
            assert found[first][last] == pytest.approx(float(cosine), abs=1e-6)


@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_training_equals_a_plain_loop_of_torch(kind: str, documents: Documents, tmp_path: Path) -> None:
    model, schedule = made_model(kind), LearningRateSchedule(1e-3, 2, 4, RATE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters, curves = trained(model, documents, schedule, tmp_path)
    expected = dict(by_hand(model, documents, schedule).named_parameters())
    layer = family_of(model.config).decoder_layers(model)[TRAINED]
    moved = sum(float((expected[name] - value).norm()) for name, value in layer.named_parameters())
    assert moved > 1e-2
    assert parameters.keys() == expected.keys()
    apart = sum(float((expected[name] - value).norm()) for name, value in parameters.items())
    assert apart < 1e-2 * moved
    assert len(curves["loss"]) == 6
    # The dense model is unchanged, and no other parameter got a gradient.
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_the_loss_falls_on_training_and_on_held_out_texts(tmp_path: Path) -> None:
    texts = many_documents(40)
    _, curves = trained(made_model(), texts, LearningRateSchedule(3e-3, 12, 4, RATE), tmp_path)
    losses, held_out = [loss for _, loss in curves["loss"]], curves["held_out_loss"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert held_out[0][0] == 0
    assert held_out[-1][0] == len(losses)
    assert held_out[-1][1] < 0.9 * held_out[0][1]
    assert (tmp_path / "loss.tsv").read_text().splitlines()[0] == "step\tloss"
    assert len((tmp_path / "held_out_loss.tsv").read_text().splitlines()) == len(held_out) + 1


@pytest.mark.parametrize("pieces", [1, 2])
def test_held_out_texts_are_not_trained_on(pieces: int, tmp_path: Path) -> None:
    texts = Documents(many_documents(40).documents, [number // pieces for number in range(40)])
    distillation = distillation_of(made_model(), texts)
    ordered = texts.in_walk_order()
    train_indices, held_out = split_indices(ordered.sources, llm_streamline.HELD_OUT_EVERY)
    assert (sorted(train_indices + held_out), len(held_out)) == ([*range(40)], 2)
    assert not {ordered.sources[place] for place in train_indices} & {ordered.sources[place] for place in held_out}
    schedule = LearningRateSchedule(1e-3, 1, 4, RATE)
    first, _ = trained_on(distillation, schedule, tmp_path / "one")
    for index in held_out:
        start = distillation.starts[index]
        distillation.targets[start : start + len(distillation.batches.texts[index])] += 1
    second, _ = trained_on(distillation, schedule, tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bfloat16_states_are_trained_in_float32(documents: Documents, tmp_path: Path) -> None:
    parameters, _ = trained(made_model(dtype=torch.bfloat16), documents, LearningRateSchedule(1e-4, 1, 4, RATE), tmp_path)
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    # Steps this small are lost in bfloat16.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in parameters.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])
def test_the_trained_layer_sees_no_later_token(kind: str, documents: Documents, tmp_path: Path) -> None:
    model = made_model(kind)
    distillation = distillation_of(model, documents)
    parameters, _ = trained_on(distillation, LearningRateSchedule(1e-2, 2, 4, RATE), tmp_path)
    batch, rows = distillation.batches.batch([0]), distillation.rows(distillation.inputs, [0])
    changed = rows.clone()
    changed[20:] += 1
    with torch.no_grad():
        one, other = (distillation.states(parameters, batch, each)[0] for each in (rows, changed))
    assert torch.equal(one[:20], other[:20])
    assert not torch.equal(one[20:], other[20:])


def test_a_bad_learning_rate_is_named(documents: Documents, tmp_path: Path) -> None:
    with pytest.raises(SolveError, match=r"llm_streamline_learning_rate: the loss of the training is (nan|inf) at step"):
        trained(made_model(), documents, LearningRateSchedule(1e30, 3, 4, RATE), tmp_path)


@pytest.mark.parametrize("after", [1, 4, 6])
@pytest.mark.usefixtures("checkpoint_at_each_chance")
def test_an_interrupted_run_resumes_to_the_same_bits(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, schedule, model = many_documents(21), LearningRateSchedule(1e-3, 2, 5, RATE), made_model()
    expected, curves = trained(model, texts, schedule, tmp_path / "whole")
    steps = len(curves["loss"])
    assert steps == 8

    def stopping(taken: int) -> None:
        if taken == after:
            # One step further than the last checkpoint.
            monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 1e9)
        stop_at(after + 1)(taken)

    with counted(stopping), pytest.raises(InterruptedRunError):
        trained(model, texts, schedule, tmp_path / "stopped")
    with counted() as again:
        found, rest = trained(model, texts, schedule, tmp_path / "stopped")
    assert again == [*range(after, steps)]
    assert rest == curves
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (tmp_path / "stopped" / "loss.tsv").read_text() == (tmp_path / "whole" / "loss.tsv").read_text()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon", "qwen2_moe"])
def test_a_trained_layer_is_exported_as_a_plain_model_and_verified(
    kind: str, save_tiny: Callable[..., Model], documents: Documents, tmp_path: Path
) -> None:
    source = save_tiny(kind)
    edits, _ = trained_by(source, documents, tmp_path, llm_streamline_learning_rate=1e-2)
    assert edits.title == "LLM-Streamline (a trained layer)"
    save_pruned(source, edits, tmp_path / "pruned")
    assert not is_own_form(tmp_path / "pruned")
    verify_export(source, Model(tmp_path / "pruned", "pruned"), edits, documents)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    expected = expected_logits(source, edits)
    for logits in (loaded(TEXT).logits, *hooked_and_folded(source.load(), source.family(), edits)):
        assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("at", [0, TRAINED])
@pytest.mark.parametrize("kind", APART)
def test_a_layer_without_attention_is_its_mlp_and_loads_with_its_file(
    kind: str, at: int, save_tiny: Callable[..., Model], documents: Documents, tmp_path: Path
) -> None:
    source = save_tiny(kind)
    family, dense = source.family(), source.load()
    without = (family.attention, family.attention_norm)
    edits = Edits("test", [2, 3], model_edit=TrainedLayer(at, {}, without))
    counts = save_pruned(source, edits, tmp_path / "pruned")
    assert is_own_form(tmp_path / "pruned")
    layer = family.decoder_layers(dense)[at]
    gone = {name for path in without for name, _ in layer.get_submodule(path).named_parameters(path)}
    removed = sum(parameter.numel() for each in (2, 3) for parameter in family.decoder_layers(dense)[each].parameters())
    removed += sum(layer.get_parameter(name).numel() for name in gone)
    assert counts["parameters"] == counts["parameters_dense"] - removed
    weights = load_file(tmp_path / "pruned" / "model.safetensors")
    assert gone
    assert not [name for name in weights if any(name.endswith(f"{family.layers}.{at}.{part}") for part in gone)]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True).eval()
    expected = expected_logits(source, edits)
    for logits in (loaded(TEXT).logits, *hooked_and_folded(source.load(), family, edits)):
        assert torch.allclose(logits, expected, rtol=1e-3, atol=1e-3)
    verify_export(source, Model(tmp_path / "pruned", "pruned"), edits, documents)
    assert measure_cache_error(loaded, TEXT[0]) < 1e-4
    assert cache_bytes_per_token(loaded) < cache_bytes_per_token(dense)


@pytest.mark.parametrize("plain", [False, True])
def test_a_trained_mlp_leaves_attention_out_or_plainly_silent(
    plain: bool, save_tiny: Callable[..., Model], documents: Documents, tmp_path: Path
) -> None:
    source = save_tiny("llama")
    settings = {"llm_streamline_form": "mlp", "llm_streamline_learning_rate": 1e-2, "plain": plain}
    edits, edit = trained_by(source, documents, tmp_path, **settings)
    zeroed = {"self_attn.o_proj.weight", "self_attn.o_proj.bias"}
    assert {name for name in edit.parameters if "self_attn" in name} == (zeroed if plain else set())
    assert "input_layernorm.weight" not in edit.parameters
    assert {"mlp.gate_proj.weight", "mlp.down_proj.bias", "post_attention_layernorm.weight"} <= edit.parameters.keys()
    save_pruned(source, edits, tmp_path / "pruned")
    assert is_own_form(tmp_path / "pruned") is not plain
    verify_export(source, Model(tmp_path / "pruned", "pruned"), edits, documents)
    # Both are h + MLP(norm(h)), by hand.
    model = source.load()
    layer = model.model.layers[TRAINED]
    with torch.no_grad():
        for name, value in edit.parameters.items():
            layer.get_parameter(name).copy_(value)
    layer.forward = lambda hidden_states, **_: hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
    pruned = Model(tmp_path / "pruned", "pruned").load()
    expected, found = (layer_called(each, TRAINED, TEXT[0])[2] for each in (model, pruned))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"llm_streamline_form": "mlp", "plain": True}])
def test_the_stages_choose_train_and_export(options: dict[str, Any], params: Params, tiny: Model, tmp_path: Path) -> None:
    settings = {"method": "llm_streamline", "batch_size": 4, "llm_streamline_epochs": 3, "llm_streamline_learning_rate": 3e-3}
    params, work = params.model_copy(update={**settings, **options}), Workspace(tmp_path / "run")
    run_stages(params, work, *SOLVED, "repair", "heal", "check", "export")
    (block,) = load_blocks(work.blocks)
    if not options:
        cosines = read_json(work.profile / "profile.json")["mean_cosine"]
        best = max(range(LAYERS - 2), key=lambda first: cosines[first][first + 2])
        assert (block.layer_before_cut, block.end - 1) == (best, best + 2)
        assert read_json(work.metric("select"))["mean_cosine"] == pytest.approx(cosines[best][best + 2], rel=1e-5)
    figures = read_json(work.metric("repair"))
    assert figures["training_loss_last"] < figures["training_loss_first"]
    assert figures["held_out_loss_last"] < figures["held_out_loss_first"]
    assert len((work.edits / "loss.tsv").read_text().splitlines()) == figures["training_steps"] + 1
    assert not [path for path in work.edits.parent.iterdir() if "partial" in path.name]
    card = (work.model / "README.md").read_text(encoding="utf-8")
    assert "with LLM-Streamline (a trained" in card
    assert f"The weights of layer {block.layer_before_cut} were trained on calibration text" in card
    assert ("its attention output projection is 0" in card) == bool(options.get("plain"))
    assert "llm_streamline_epochs: 3" in card
    loaded = Model(work.model, "pruned").load()
    assert loaded.config.num_hidden_layers == LAYERS - 2
    assert is_own_form(work.model) == ("llm_streamline_form" in options and "plain" not in options)


def test_families_whose_layers_have_no_mlp_of_their_own_are_refused_for_the_form_mlp() -> None:
    cases: list[tuple[Family, str]] = [
        (Family(parallel=True), "the family 'x', whose attention and MLP are parallel"),
        (OBSTACLES["norm"], "the norm after the MLP of the family 'x'; use layer."),
        (OBSTACLES["undescribed"], "the undescribed family 'x'; use layer."),
    ]
    for family, said in cases:
        assert model_refusals(family, method="llm_streamline") == []
        (problem,) = model_refusals(family, method="llm_streamline", llm_streamline_form="mlp")
        assert problem.startswith(f"llm_streamline_form: mlp is not derived for {said}")
    assert model_refusals(OBSTACLES["experts"], method="llm_streamline", llm_streamline_form="mlp") == []


def test_the_schedule_warms_up_and_ends_at_a_quarter() -> None:
    schedule = LearningRateSchedule(2e-4, 1, 1, RATE)
    rates = [schedule.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(2e-5)
    assert rates[9] == max(rates) == pytest.approx(2e-4)
    assert rates[-1] == pytest.approx(5e-5)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert schedule.rate(0, 1) == pytest.approx(2e-4)
