"""Healing: the training toward the dense model's predictions, against a plain loop of torch on the cut model itself."""

from collections.abc import Callable
from copy import deepcopy
from errno import ENOSPC
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from replaceme.base.documents import Documents
from replaceme.base.files import read_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Plan
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.models.context import ModelContext
from replaceme.models.families import family_of
from replaceme.models.model import Model
from replaceme.pipeline.activations import observe_activations
from replaceme.pipeline.calibrate import calibrate
from replaceme.pipeline.cost import compression_figures
from replaceme.pipeline.export import export
from replaceme.pipeline.heal import heal
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.pipeline.plan import plan
from replaceme.pipeline.profile import profile
from replaceme.pipeline.repair import repair
from replaceme.pipeline.select import select
from replaceme.pipeline.solve import solve
from replaceme.running.workspace import Workspace
from replaceme.statistics.features import LINEARS
from replaceme.training import healing
from replaceme.training.healing import LogitDistillation
from replaceme.training.training import LearningRateSchedule, record_entry_and_exit, shuffled_batches, train
from tests.conftest import LAYERS, PLAIN_REPRESENTATIVES, WIDTH, made_model
from tests.helpers import many_documents
from tests.interruption import InterruptedRunError, counted, stop_at
from tests.methods.helpers import BLOCK, solved

RATE = "heal_learning_rate"


def task_of(model: Any, documents: Documents, edits: Edits, host: int = BLOCK.layer_before_cut) -> LogitDistillation:
    """Return the task for the layers from a cut on."""
    family = family_of(model.config)
    states = record_entry_and_exit(ModelContext(model, family, documents, 4), host, LAYERS - 1)
    return LogitDistillation(ModelContext(model, family, documents, 4), edits, host, *states)


def edits_of(model: Any, documents: Documents, blocks: tuple[Block, ...] = (BLOCK,), **options: Any) -> Edits:
    """Return the edits that the stages solve and repair make."""
    edits, run_repair = solved(model, documents, blocks, alpha=5.0, **options)
    planned = Plan(blocks, ())
    edits.mixtures |= planned.mixtures
    edits.operators |= {host: torch.tensor(scale, dtype=torch.float64) for host, scale in planned.scales.items()}
    run_repair()
    return edits


def divergence(model: Any, shortened: Any, text: Tensor, places: Tensor | slice = slice(None)) -> tuple[Tensor, int]:
    """Return the sum over a text's places of KL(dense ‖ shortened), and the number of places."""
    with torch.no_grad():
        wanted = log_softmax(model(text[None], use_cache=False).logits[0, places].float(), dim=-1)
    found = log_softmax(shortened(text[None], use_cache=False).logits[0, places].float(), dim=-1)
    return (wanted.exp() * (wanted - found)).sum(), len(found)


def by_hand(model: Any, shortened: Any, documents: Documents, schedule: LearningRateSchedule) -> None:
    """Train a cut model in a plain loop: one document at a time, no padding, all places, torch's own AdamW."""
    family, texts = family_of(model.config), documents.in_walk_order().documents
    layers = family.decoder_layers(shortened)[BLOCK.layer_before_cut :]
    names = [family.output_parameters(layer, linear) for layer in layers for linear in LINEARS]
    trainable_parameters = [
        layer.get_parameter(name)
        for layer, found in zip([layer for layer in layers for _ in LINEARS], names, strict=True)
        for name in found
    ]
    shortened.requires_grad_(False)
    for learner in trainable_parameters:
        learner.requires_grad_(True)
    optimizer = torch.optim.AdamW(trainable_parameters, lr=schedule.learning_rate, weight_decay=1e-3)
    step, steps = 0, schedule.epochs * -(-len(texts) // schedule.batch_size)
    for epoch in range(schedule.epochs):
        for batch in shuffled_batches(range(len(texts)), epoch, schedule.batch_size):
            sums = [divergence(model, shortened, texts[index]) for index in batch]
            optimizer.zero_grad()
            (torch.stack([total for total, _ in sums]).sum() / sum(count for _, count in sums)).backward()
            torch.nn.utils.clip_grad_norm_(trainable_parameters, 5.0)
            optimizer.param_groups[0]["lr"] = schedule.rate(step, steps)
            optimizer.step()
            step += 1


@pytest.mark.parametrize("kind", PLAIN_REPRESENTATIVES)
def test_healing_equals_a_plain_loop_on_the_cut_model(
    kind: str, documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "SHARE", 1.0)
    model, schedule = made_model(kind), LearningRateSchedule(1e-3, 2, 4, RATE)
    edits = edits_of(model, documents, repair=True)
    dense, expected = deepcopy(model), deepcopy(model)
    apply_edits(expected, family_of(model.config), edits)
    bare = deepcopy(expected)
    task = task_of(model, documents, edits)
    trainable_parameters = task.trainable_parameters()
    with task.training_context():
        for chosen in ([0], [0, len(documents) - 1]):
            sums = [divergence(dense, expected, task.batches.texts[index]) for index in chosen]
            whole = sum(float(total.detach()) for total, _ in sums) / sum(count for _, count in sums)
            assert float(task.loss(trainable_parameters, chosen, 0).detach()) == pytest.approx(whole, rel=1e-4)
    parameters, curves = train(task, trainable_parameters, schedule, tmp_path, "")
    task.add_corrections(edits, parameters)
    by_hand(dense, expected, documents, schedule)
    apply_edits(model, family_of(model.config), edits)
    found = dict(model.named_parameters())
    moved = apart = 0.0
    for (name, one), other in zip(expected.named_parameters(), bare.parameters(), strict=True):
        moved += float((one - other).detach().norm())
        apart += float((one - found[name]).detach().norm())
    assert moved > 1e-2
    assert apart < 2e-2 * moved
    assert len(curves["loss"]) == 6
    kept = [layer for layer in range(LAYERS) if layer not in BLOCK.layers]
    assert {layer for layer, _ in edits.corrections} == {*kept[BLOCK.layer_before_cut :]}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
def test_with_narrower_mlps_training_begins_at_the_first_layer(
    kind: str, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "SHARE", 1.0)
    model = made_model(kind)
    edits = edits_of(model, documents, mlp_width=24, transform="channels", repair=True)
    dense, shortened = deepcopy(model), deepcopy(model)
    apply_edits(shortened, family_of(model.config), edits)
    total, count = divergence(dense, shortened, task_of(model, documents, edits, 0).batches.texts[0])
    found = []
    for host in (0, BLOCK.layer_before_cut):
        task = task_of(model, documents, edits, host)
        with task.training_context():
            found.append(float(task.loss(task.trainable_parameters(), [0], 0).detach()))
    assert found[0] == pytest.approx(float(total.detach()) / count, rel=1e-4)
    assert found[1] != pytest.approx(found[0], rel=1e-3)


def test_the_dense_model_stays_unchanged(documents: Documents, tmp_path: Path) -> None:
    model = made_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    task = task_of(model, documents, edits_of(model, documents, transform="channels", refit_ridge=0.1))
    train(task, task.trainable_parameters(), LearningRateSchedule(1e-3, 1, 4, RATE), tmp_path, "")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_a_step_compares_part_of_the_places_and_no_padding(documents: Documents) -> None:
    model = made_model()
    edits = edits_of(model, documents)
    shortened = deepcopy(model)
    apply_edits(shortened, family_of(model.config), edits)
    task = task_of(model, documents, edits)
    trainable_parameters, chosen = task.trainable_parameters(), [0, len(documents) - 1]
    longest, shortest = (task.batches.texts[index] for index in chosen)
    assert len(shortest) < len(longest)
    found = []
    for step in (3, 4, None):
        chance = torch.Generator().manual_seed(-1 if step is None else step)
        places = torch.randperm(len(longest), generator=chance)[: round(healing.SHARE * len(longest))]
        sums = [divergence(model, shortened, text, places[places < len(text)]) for text in (longest, shortest)]
        with task.training_context(), torch.no_grad():
            found.append(float(task.loss(trainable_parameters, chosen, step)))
        whole = sum(float(total.detach()) for total, _ in sums) / sum(count for _, count in sums)
        assert found[-1] == pytest.approx(whole, rel=1e-4)
    assert len({*found}) == 3


@pytest.mark.parametrize(
    ("kind", "blocks", "options"),
    [
        ("llama", (BLOCK,), {"transform": "channels", "repair": True}),
        ("gpt2", (BLOCK,), {"transform": "joint"}),
        ("opt", (BLOCK,), {"transform": "dense"}),
        ("falcon", (BLOCK,), {"method": "uidl"}),
        ("gpt_neox", (Block(1, 2), Block(3, 5)), {"transform": "dense", "repair": True}),
        ("gemma2", (BLOCK,), {"transform": "orthogonal"}),
        ("gemma3_text", (BLOCK,), {"method": "uidl"}),
        ("olmo2", (BLOCK,), {"transform": "orthogonal"}),
        ("llama", (Block(4, 6),), {"transform": "refit"}),  # no layer is left after the cut
        ("granite", (BLOCK,), {"method": "ghosted"}),
        ("phi3", (Block(1, 2, scale=1.7), Block(3, 4, scale=1.2)), {"method": "prune_and_comp"}),
        ("gpt2", (Block(2, 4, coefficients=(-1.0, 1.0, 1.0)),), {"method": "laco"}),
    ],
)
def test_a_healed_model_is_closer_to_the_dense_one_and_its_export_is_verified(
    kind: str, blocks: tuple[Block, ...], options: dict[str, Any], save_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    source, documents = save_tiny(kind), many_documents(40)
    edits = edits_of(source.load(), documents, blocks, **options)
    task = task_of(source.load(), documents, edits, blocks[0].layer_before_cut)
    trainable_parameters, losses = task.trainable_parameters(), []
    for _ in range(2):
        with task.training_context(), torch.no_grad():
            losses.append(float(task.loss(trainable_parameters, range(20), None)))
        if len(losses) < 2:
            parameters, _ = train(task, trainable_parameters, LearningRateSchedule(5e-4, 4, 4, RATE), tmp_path, "")
    assert losses[1] < 0.99 * losses[0]
    task.add_corrections(edits, parameters)
    save_pruned(source, edits, tmp_path / "pruned")
    verify_export(source, Model(tmp_path / "pruned", "pruned"), edits, documents)
    # The exported model computes the same loss as the training did.
    model, pruned = source.load(), Model(tmp_path / "pruned", "pruned").load()
    places = torch.randperm(longest := len(task.batches.texts[19]), generator=torch.Generator().manual_seed(-1))
    places = places[: round(healing.SHARE * longest)]
    total, count = divergence(model, pruned, task.batches.texts[19], places)
    with task.training_context(), torch.no_grad():
        assert float(task.loss(parameters, [19], None)) == pytest.approx(float(total.detach()) / count, rel=1e-3, abs=1e-4)


def run(params: Params, work: Workspace, to_export: bool = True) -> None:
    stages = (inspect_inputs, calibrate, profile, select, plan, observe_activations, solve, repair, heal)
    for stage in (*stages, export) if to_export else stages:
        stage(params, work)


def test_the_stage_trains_exports_and_says_so(params: Params, tmp_path: Path) -> None:
    settings = {"heal_epochs": 3, "heal_learning_rate": 3e-3, "batch_size": 4, "repair": True}
    params, work = params.model_copy(update=settings), Workspace(tmp_path / "run")
    run(params, work)
    figures = read_json(work.metric("heal"))
    assert figures["training_loss_last"] < figures["training_loss_first"]
    assert figures["held_out_loss_last"] < figures["held_out_loss_first"]
    assert len((work.edits / "loss.tsv").read_text().splitlines()) == figures["training_steps"] + 1
    assert not [path for path in work.edits.parent.iterdir() if "partial" in path.name]
    card = (work.model / "README.md").read_text(encoding="utf-8")
    said = (
        "trained on calibration text to match the original model's predictions, starting from weights refitted in closed form."
    )
    assert said in card
    assert "heal_epochs: 3" in card
    assert compression_figures(params, work)["trained"] is True
    assert compression_figures(params.model_copy(update={"heal_epochs": 0}), work)["trained"] is False


@pytest.mark.usefixtures("checkpoint_at_each_chance")
def test_an_interrupted_healing_resumes_to_the_same_bits(params: Params, tmp_path: Path) -> None:
    params, work = params.model_copy(update={"heal_epochs": 2, "batch_size": 4}), Workspace(tmp_path / "run")
    run(params, work, to_export=False)
    expected, curve = sha256_below(work.edits), (work.edits / "loss.tsv").read_text()
    with counted(stop_at(3)) as steps, pytest.raises(InterruptedRunError):
        heal(params, work)
    # The earlier result is still there.
    assert sha256_below(work.edits) == expected
    with counted() as rest:
        heal(params, work)
    assert steps + rest == [*range(len(curve.splitlines()) - 1)]
    assert sha256_below(work.edits) == expected
    # Other edits make another training.
    edits = Edits.load(work.repaired)
    edits.correct(edits.removed_layers[0] - 1, "mlp_output", torch.full((WIDTH, 48), 1e-3))
    with counted(stop_at(3)), pytest.raises(InterruptedRunError):
        heal(params, work)
    edits.save(work.repaired)
    with counted() as again:
        heal(params, work)
    assert again[0] == 0


@pytest.mark.parametrize("failing", ["pipeline.heal.copy_tree", "pipeline.heal.write_json"])
@pytest.mark.usefixtures("checkpoint_at_each_chance")
def test_a_healing_whose_results_can_not_be_written_is_not_trained_again(
    failing: str, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, work = params.model_copy(update={"method": "uidl", "heal_epochs": 1}), Workspace(tmp_path / "run")
    run(params, work, to_export=False)
    expected = sha256_below(work.edits)

    def full(*_: Any) -> None:
        raise OSError(ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(f"replaceme.{failing}", full)
        with pytest.raises(OSError, match="no space left"):
            heal(params, work)
    with counted() as steps:
        heal(params, work)
    assert steps == []
    assert sha256_below(work.edits) == expected
    assert not [path for path in work.edits.parent.iterdir() if "partial" in path.name]


def test_repair_and_heal_work_on_read_only_links(params: Params, tmp_path: Path) -> None:
    settings = {"method": "llm_streamline", "heal_epochs": 0}
    params, work = params.model_copy(update=settings), Workspace(tmp_path / "run")
    run(params, work, to_export=False)
    expected = sha256_below(work.edits)
    # As DVC links its outputs, to a cache on the same disk or on another one.
    for folder in (work.solution, work.repaired):
        kept = folder.rename(tmp_path / f"{folder.name}.kept")
        folder.mkdir()
        for number, path in enumerate(sorted(kept.iterdir())):
            path.chmod(0o444)
            (folder / path.name).symlink_to(path) if number % 2 else (folder / path.name).hardlink_to(path)
    heal(params.model_copy(update={"method": "uidl", "heal_epochs": 1}), work)
    repair(params, work)
    heal(params, work)
    assert sha256_below(work.edits) == expected
    for folder in (work.solution, work.repaired):
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / f"{folder.name}.kept").iterdir()} == {0o444}
