"""Healing: the training toward the dense model's predictions, against a plain loop of torch on the shortened model itself."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from errno import ENOSPC
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import log_softmax

from replaceme.base.documents import TEXT, Documents
from replaceme.base.entries import Source
from replaceme.base.errors import DatasetError, ResourceError
from replaceme.base.files import read_json
from replaceme.base.fingerprints import sha256_below
from replaceme.base.parameters import Params, read_params
from replaceme.base.plan import Block, Plan
from replaceme.calibration import own_text
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.models import find
from replaceme.models.context import ModelContext
from replaceme.models.families import family_of, in_torch_layout
from replaceme.models.find import calibration_context, find_model
from replaceme.models.memory import healing_bytes
from replaceme.models.model import Model
from replaceme.models.width import mlp_width_entry
from replaceme.pipeline.activations import observe_activations
from replaceme.pipeline.calibrate import calibrate
from replaceme.pipeline.check import check
from replaceme.pipeline.cost import compression_figures
from replaceme.pipeline.export import export
from replaceme.pipeline.generate import generate
from replaceme.pipeline.heal import draw_text, heal
from replaceme.pipeline.inputs import inspect_inputs
from replaceme.pipeline.plan import plan
from replaceme.pipeline.profile import profile
from replaceme.pipeline.repair import repair
from replaceme.pipeline.select import select
from replaceme.pipeline.solve import solve
from replaceme.report.sentences import describe_healing
from replaceme.running.workspace import Workspace
from replaceme.training import distillation
from replaceme.training.distillation import BETAS, CLIP, LogitDistillation, plan_steps
from replaceme.training.muon import orthogonalize
from replaceme.training.training import StepPlan, TrainingRun, train
from tests.conftest import REPRESENTATIVES, WIDTH, made_model, made_text
from tests.helpers import many_documents
from tests.interruption import InterruptedRunError, counted, stop_at
from tests.methods.helpers import BLOCK, solved

TRAINED = ("all", "after_cut", "outputs")


def task_of(
    model: Any, edits: Edits, which: str = "all", first: int = BLOCK.layer_before_cut, count: int = 8
) -> LogitDistillation:
    return LogitDistillation(ModelContext(model, family_of(model.config), many_documents(count), 2), edits, first, which, 4)


def edits_of(model: Any, blocks: tuple[Block, ...] = (BLOCK,), **options: Any) -> Edits:
    """Return the edits that the stages solve and repair make."""
    edits, run_repair = solved(model, many_documents(), blocks, alpha=5.0, **options)
    planned = Plan(blocks, ())
    edits.mixtures |= planned.mixtures
    edits.operators |= {layer: torch.tensor(scale, dtype=torch.float64) for layer, scale in planned.scales.items()}
    run_repair()
    return edits


def shortened(model: Any, edits: Edits) -> Any:
    """Return a copy of a model with the edits folded in."""
    made = deepcopy(model)
    apply_edits(made, family_of(model.config), edits)
    return made.requires_grad_(True)


def divergence(model: Any, other: Any, texts: list[Tensor]) -> Tensor:
    """Return the mean over the tokens of KL(model ‖ other), one text at a time."""
    sums = []
    for text in texts:
        with torch.no_grad():
            p = log_softmax(model(text.long()[None], use_cache=False).logits[0].float(), dim=-1)
        q = log_softmax(other(text.long()[None], use_cache=False).logits[0].float(), dim=-1)
        sums.append((p.exp() * (p - q)).sum())
    return torch.stack(sums).sum() / sum(map(len, texts))


@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_loss_and_gradients_are_those_of_the_shortened_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "ROWS", 7)
    model, chosen = made_model(kind), [0, 3, 2]
    edits = Edits("", [*BLOCK.layers])
    for which in (*TRAINED, "lora"):
        task, plain = task_of(model, edits, which), shortened(model, edits)
        parameters = task.trainable_parameters()
        with task.training_context():
            loss = task.loss(parameters, chosen)
        expected = divergence(model, plain, [task.documents.documents[index] for index in chosen])
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
        expected.backward()
        largest = max(float(value.grad.norm()) for value in plain.parameters() if value.grad is not None)
        for name, parameter in parameters.items():
            weight = name.removesuffix(".a").removesuffix(".b")
            whole = plain.get_parameter(weight).grad
            assert whole is not None
            assert parameter.grad is not None
            if name.endswith(".b"):
                whole = in_torch_layout(plain, weight, whole) @ parameters[f"{weight}.a"].detach().T
            elif name.endswith(".a"):  # its factor is zero
                whole = torch.zeros_like(parameter)
            # The bias of keys changes no prediction: its gradient is rounding alone.
            assert float((parameter.grad - whole).norm()) < 1e-4 * float(whole.norm()) + 1e-6 * largest, name


@pytest.mark.parametrize("muon", [False, True])
def test_a_training_equals_a_plain_loop_of_torch(muon: bool, tmp_path: Path) -> None:
    model = made_model()
    task = task_of(model, edits_of(model, transform="channels", repair=True), count=24)
    plain, parameters = shortened(model, task.edits), task.trainable_parameters()
    steps = replace(plan_steps(task.documents, [1.0], 300, 40, 1e-3), held_out=[])
    steps = replace(steps, muon=task.matrices if muon else (), muon_products=torch.float32)
    train(task, parameters, steps, tmp_path, "")
    learners = [plain.get_parameter(name) for name in parameters]
    matrices = [learner for learner in learners if muon and learner.ndim == 2]
    others = [learner for learner in learners if not (muon and learner.ndim == 2)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=1e-3)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw"))
    for documents, rate in zip(steps.documents, steps.rates, strict=True):
        divergence(model, plain, [task.batches.texts[index] for index in documents]).backward()
        torch.nn.utils.clip_grad_norm_(learners, 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    start = shortened(model, task.edits)
    moved = sum(float((plain.get_parameter(name) - start.get_parameter(name)).detach().norm()) for name in parameters)
    apart = sum(float((plain.get_parameter(name) - value).detach().norm()) for name, value in parameters.items())
    assert moved > 0.1
    # torch's own Muon multiplies in bfloat16.
    assert apart < (3e-2 if muon else 1e-2) * moved


def test_an_orthogonalized_update_keeps_its_singular_vectors() -> None:
    for shape in ((12, 40), (40, 12), (16, 16)):
        matrix = torch.randn(shape)
        left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        values = left.T @ orthogonalize(matrix, torch.float32).double() @ right.T
        assert float((values - values.diagonal().diag()).abs().max()) < 1e-3
        assert 0.5 < float(values.diagonal().min()) <= float(values.diagonal().max()) < 1.3
    assert not orthogonalize(torch.zeros(4, 6), torch.bfloat16).any()


def test_experts_norms_and_lora_learn_by_adamw(tmp_path: Path) -> None:
    task = task_of(made_model("mixtral"), Edits("", [*BLOCK.layers]))
    parameters = task.trainable_parameters()
    by_muon = {*task.matrices}
    assert by_muon
    assert all(parameters[name].ndim == 2 for name in by_muon)
    assert not [name for name in by_muon if "norm" in name]
    assert {name for name in parameters if "experts" in name} - by_muon
    assert task_of(made_model(), Edits("", [*BLOCK.layers]), "lora").matrices == []
    steps = replace(plan_steps(task.documents, [1.0], 60, 20, 1e-3), muon=task.matrices, muon_products=torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    train(task, parameters, steps, tmp_path, "")
    assert all(not torch.equal(before[name], parameter) for name, parameter in parameters.items() if name in by_muon)


@settings(deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(1, 300)), min_size=2, max_size=60),
    tokens=st.integers(1, 20_000),
    more=st.integers(1, 20_000),
    step=st.integers(1, 2000),
)
def test_a_longer_training_begins_as_a_shorter_one_and_no_source_is_trained_on_and_held_out(
    pieces: list[tuple[int, int, int]], tokens: int, more: int, step: int
) -> None:
    lengths, sources = [length for _, _, length in pieces], [(domain << 32) + source for domain, source, _ in pieces]
    text = Documents([torch.zeros(length, dtype=torch.int64) for length in lengths], sources)
    by_domain = {domain: {source for source in sources if source >> 32 == domain} for domain in range(3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "HELD_OUT_TOKENS", 400)
        short, long = (plan_steps(text, [1.0, 2.0, 0.5], count, step, 1e-3) for count in (tokens, tokens + more))
    for made, count in ((short, tokens), (long, tokens + more)):
        taken = [index for documents in made.documents for index in documents]
        held_out = {sources[index] for index in made.held_out}
        assert not held_out & {sources[index] for index in taken}
        assert all(
            5 * len({each for each in held_out if each >> 32 == domain}) <= len(own) for domain, own in by_domain.items()
        )
        assert count <= sum(lengths[index] for index in taken) < count + max(lengths)
        assert all(len(documents) == 1 or sum(lengths[index] for index in documents) <= step for documents in made.documents)
        assert 0 < min(made.rates) <= max(made.rates) <= 1e-3
    assert [*short.held_out] == [*long.held_out]
    assert [*short.documents[: short.shared]] == [*long.documents[: short.shared]]
    assert [*short.rates[: short.shared]] == [*long.rates[: short.shared]]


def test_a_text_of_one_document_is_trained_on_and_what_is_held_out_comes_of_the_others() -> None:
    text = Documents([torch.zeros(size, dtype=torch.int64) for size in [300] + [20] * 20], [1 << 32, *range(20)])
    made = plan_steps(text, [1.0, 1.0], 600, 100, 1e-3)
    assert 0 in {index for documents in made.documents for index in documents}
    assert [*made.held_out] == [5, 10, 15, 20]
    alone = plan_steps(text.taken([0]), [1.0, 1.0], 600, 100, 1e-3)
    assert (alone.documents, alone.held_out) == ([[0], [0]], [])


def test_a_training_with_other_documents_held_out_is_no_continuation(tmp_path: Path) -> None:
    task = task_of(made_model(), Edits("", [*BLOCK.layers]))
    plan = replace(plan_steps(task.documents, [1.0], 60, 20, 1e-3), held_out=[])
    train(task, task.trainable_parameters(), plan, tmp_path, "")
    resumed = TrainingRun(task, task.trainable_parameters(), plan, tmp_path, "")
    more = TrainingRun(task, task.trainable_parameters(), replace(plan, held_out=[len(task.documents) - 1]), tmp_path, "")
    assert resumed.step > more.step == 0


def test_the_dense_model_stays_unchanged(tmp_path: Path) -> None:
    model = made_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = [parameter.requires_grad for parameter in model.parameters()]
    for which in (*TRAINED, "lora"):
        task = task_of(model, edits_of(model, transform="channels"), which)
        train(task, task.trainable_parameters(), plan_steps(task.documents, [1.0], 60, 20, 1e-3), tmp_path / which, "")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_each_domain_has_its_share_to_the_end_and_is_read_again_where_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "HELD_OUT_TOKENS", 100)
    sizes = [40] * 5 + [10] * 400
    text = Documents([torch.zeros(size, dtype=torch.int64) for size in sizes], [(number < 5) << 32 for number in range(405)])
    steps = plan_steps(text, [1.0, 1.0], 2000, 80, 1e-3).documents
    taken = [index for documents in steps for index in documents]
    assert all(any(index < 5 for index in documents) and any(index >= 5 for index in documents) for documents in steps)
    assert 900 <= sum(sizes[index] for index in taken if index < 5) <= 1100
    assert len({*taken}) < len(taken)


@pytest.mark.parametrize("kind", [*REPRESENTATIVES, "qwen3", "gemma3_text"])
def test_in_bfloat16_the_gradients_are_those_of_float32_to_its_digits(kind: str) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        task = task_of(made_model(kind).to(dtype), Edits("", [*BLOCK.layers]))
        parameters = task.trainable_parameters()
        with task.training_context():
            loss = task.loss(parameters, [0, 3, 2])
        assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in parameters.values())
        gradients.append((loss, torch.cat([parameter.grad.flatten() for parameter in parameters.values()])))
    (exact_loss, exact), (loss, rounded) = gradients
    assert loss == pytest.approx(exact_loss, rel=0.1)
    assert float((rounded - exact).norm()) < 0.2 * float(exact.norm())


@pytest.mark.parametrize(
    ("kind", "which", "blocks", "options"),
    [
        ("llama", "all", (BLOCK,), {"transform": "channels", "repair": True}),
        ("llama", "lora", (BLOCK,), {"transform": "channels", "repair": True}),
        ("gpt2", "lora", (BLOCK,), {"transform": "joint"}),
        ("opt", "after_cut", (BLOCK,), {"transform": "dense"}),
        ("falcon", "all", (BLOCK,), {"method": "uidl"}),
        ("gpt_neox", "outputs", (Block(1, 2), Block(3, 5)), {"transform": "dense", "repair": True}),
        ("gemma2", "all", (BLOCK,), {"transform": "orthogonal"}),
        ("gemma3_text", "outputs", (BLOCK,), {"method": "uidl"}),
        ("mixtral", "all", (BLOCK,), {"method": "uidl"}),
        ("llama", "outputs", (Block(4, 6),), {"transform": "refit"}),  # no layer is left after the cut
        ("granite", "after_cut", (BLOCK,), {"method": "ghosted"}),
        ("phi3", "outputs", (Block(1, 2, scale=1.7), Block(3, 4, scale=1.2)), {"method": "prune_and_comp"}),
        ("gpt2", "all", (Block(2, 4, coefficients=(-1.0, 1.0, 1.0)),), {"method": "laco"}),
        ("phi", "all", (BLOCK,), {"mlp_width": 24, "transform": "channels", "repair": True}),
    ],
)
def test_a_healed_model_is_closer_to_the_dense_one_and_its_export_is_verified(
    kind: str, which: str, blocks: tuple[Block, ...], options: dict[str, Any], save_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    source = save_tiny(kind)
    edits = edits_of(source.load(), blocks, **options)
    first = 0 if "mlp_width" in options else blocks[0].layer_before_cut
    if width := options.get("mlp_width"):
        edits.config = mlp_width_entry(source.config(), source.family(), width)
    task = task_of(source.load(), edits, which, first, count=40)
    parameters, texts = task.trainable_parameters(), task.documents.documents[:10]
    before = float(divergence(task.context.model, shortened(task.context.model, edits), texts).detach())
    steps = plan_steps(task.documents, [1.0], 1500, 60, 1e-3 if which == "all" else 3e-3)
    train(task, parameters, replace(steps, muon=task.matrices if which == "all" else ()), tmp_path, "")
    healed = task.healed_edits(parameters, torch.float32)
    healed.save(tmp_path)
    healed = Edits.load(tmp_path)
    save_pruned(source, healed, tmp_path / "pruned")
    verify_export(source, Model(tmp_path / "pruned", "pruned"), healed, many_documents(12))
    pruned = Model(tmp_path / "pruned", "pruned", trust_remote_code=True).load()
    after = float(divergence(task.context.model, pruned, texts).detach())
    # The exported model is the trained one.
    assert after < 0.99 * before
    with task.training_context(), torch.no_grad():
        assert task.loss(parameters, range(10)) == pytest.approx(after, rel=1e-3)


def test_a_healed_model_that_is_streamed_is_saved_to_the_same_bits(save_tiny: Callable[..., Model], tmp_path: Path) -> None:
    source = save_tiny("llama")
    task = task_of(source.load(), edits_of(source.load(), transform="channels", repair=True))
    parameters = task.trainable_parameters()
    train(task, parameters, plan_steps(task.documents, [1.0], 60, 20, 1e-3), tmp_path, "")
    healed = task.healed_edits(parameters, torch.float32)
    for name, budget in (("whole", None), ("streamed", 150_000)):
        save_pruned(source, healed, tmp_path / name, budget)
    verify_export(source, Model(tmp_path / "streamed", "pruned"), healed, many_documents(12), 150_000)
    sums = [sha256_below(tmp_path / name)["model.safetensors"] for name in ("whole", "streamed")]
    assert sums[0] == sums[1]


def run(params: Params, work: Workspace, to_export: bool = True) -> None:
    stages = (inspect_inputs, generate, calibrate, profile, select, plan, observe_activations, solve, repair, heal, check)
    for stage in (*stages, export) if to_export else stages:
        stage(params, work)


@pytest.fixture
def healing(params: Params, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Parameters of a short healing of a few steps."""
    monkeypatch.setattr(distillation, "HELD_OUT_TOKENS", 100)
    return params.model_copy(update={"heal_tokens": 600, "heal_tokens_per_step": 100, "batch_size": 4, "method": "uidl"})


def test_the_stage_trains_exports_and_says_so(healing: Params, tmp_path: Path) -> None:
    params = healing.model_copy(update={"heal_learning_rate": 1e-3, "method": "lstsq", "repair": True, "heal_tokens": 3000})
    work = Workspace(tmp_path / "run")
    run(params, work)
    figures = read_json(work.metric("heal"))
    assert figures["training_tokens"] >= 3000
    assert figures["held_out_loss_last"] < figures["held_out_loss_first"]
    assert len((work.edits / "loss.tsv").read_text().splitlines()) == figures["training_steps"] + 1
    card = (work.model / "README.md").read_text(encoding="utf-8")
    tokens = f"{figures['training_tokens']:,}"
    said = f"All weights of the kept layers were trained on {tokens} tokens of text to match the original model's predictions"
    assert f"{said}, starting from weights refitted in closed form." in card
    assert "heal_tokens: 3000" in card
    assert compression_figures(params, work)["trained"] is True
    assert compression_figures(params.model_copy(update={"heal_tokens": 0}), work)["trained"] is False


def test_the_text_is_another_than_the_calibrations_and_more_of_it_begins_the_same(healing: Params, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "Row number {number} has its own words {number * 7}."}}\n' for number in range(400)))
    params, work = (
        healing.model_copy(update={"dataset": str(rows), "dataset_size": 12, "pack": True}),
        Workspace(tmp_path / "run"),
    )
    run(params, work, to_export=False)
    calibrated = {tuple(document.tolist()) for document in Documents.load(work.documents).documents}
    trained = [tuple(document.tolist()) for document in Documents.load(work.edits / TEXT).documents]
    assert len(trained) == len({*trained}) > 5
    assert not calibrated & {*trained}
    more = draw_text(params.model_copy(update={"heal_tokens": 1200}), work, calibration_context(params, work))
    assert [tuple(document.tolist()) for document in more.documents][: len(trained)] == trained


def test_without_other_text_the_calibrations_is_read_again_and_the_log_says_so(
    healing: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params, work = healing.model_copy(update={"dataset_size": 10_000}), Workspace(tmp_path / "run")
    with caplog.at_level("WARNING", "replaceme"):
        run(params, work, to_export=False)
    assert "text.txt; the training takes all of it" in caplog.text
    assert read_json(work.metric("heal"))["training_tokens"] >= 600


def test_a_text_that_a_training_can_not_have_is_refused_by_name(healing: Params, tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("title,body\none,two\n")
    no_column = re.escape(f"its columns are title, body; in a list, {{{tmp_path / 'notes.csv'}: {{column: title}}}} names one.")
    with pytest.raises(DatasetError, match=f"^heal_dataset: .*{no_column}"):
        inspect_inputs(
            healing.model_copy(update={"heal_dataset": (Source(str(tmp_path / "notes.csv")),)}), Workspace(tmp_path / "run")
        )
    for update in ({"heal_dataset": "nothing.txt"}, {"dataset": "self"}):
        with pytest.raises(DatasetError, match="heal_dataset: "):
            inspect_inputs(healing.model_copy(update=update), Workspace(tmp_path / "run"))


@pytest.mark.usefixtures("checkpoint_at_each_chance")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_healing_resumes_to_the_same_bits(optimizer: str, healing: Params, tmp_path: Path) -> None:
    params, work = healing.model_copy(update={"heal_optimizer": optimizer}), Workspace(tmp_path / "run")
    run(params, work, to_export=False)
    expected, curve = sha256_below(work.healed), (work.edits / "loss.tsv").read_text()
    steps = len(curve.splitlines()) - 1
    # It goes on where the rate begins to fall, for another length it would fall later.
    with counted() as rest:
        heal(params, work)
    assert 0 < rest[0] < steps
    assert sha256_below(work.healed) == expected
    with counted(stop_at(1)) as taken, pytest.raises(InterruptedRunError):
        heal(params, work)
    # The earlier result is still there.
    assert sha256_below(work.healed) == expected
    with counted() as last:
        heal(params, work)
    assert taken + last == rest
    assert sha256_below(work.healed) == expected
    # Another optimizer, or other edits, make another training.
    other = {"adamw": "muon", "muon": "adamw"}[optimizer]
    with counted() as again:
        heal(params.model_copy(update={"heal_optimizer": other}), work)
    assert again[0] == 0
    assert sha256_below(work.healed) != expected
    edits = Edits.load(work.repaired)
    edits.correct(edits.removed_layers[0] - 1, "mlp_output", torch.full((WIDTH, 48), 1e-3))
    edits.save(work.repaired)
    with counted() as again:
        heal(params, work)
    assert again[0] == 0


def test_a_longer_healing_goes_on_from_a_shorter_one_to_the_same_bits(healing: Params, tmp_path: Path) -> None:
    longer = healing.model_copy(update={"heal_tokens": 1500})
    one, two = Workspace(tmp_path / "one"), Workspace(tmp_path / "two")
    run(longer, one, to_export=False)
    run(healing, two, to_export=False)
    with counted() as steps:
        heal(longer, two)
    assert steps[0] > 2
    assert sha256_below(one.healed) == sha256_below(two.healed)


@pytest.mark.usefixtures("checkpoint_at_each_chance")
def test_a_healing_whose_results_can_not_be_written_is_not_trained_again(
    healing: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workspace(tmp_path / "run")
    run(healing, work, to_export=False)
    expected = sha256_below(work.healed)

    def full(*_: Any) -> None:
        raise OSError(ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr("replaceme.pipeline.heal.write_json", full)
        with pytest.raises(OSError, match="no space left"):
            heal(healing, work)
    with counted() as steps:
        heal(healing, work)
    assert steps == []
    assert sha256_below(work.healed) == expected
    assert not [path for path in work.healed.parent.iterdir() if "partial" in path.name]


@pytest.mark.usefixtures("checkpoint_at_each_chance")
@pytest.mark.parametrize("harm", ["a bit", "another number of threads"])
def test_a_damaged_checkpoint_or_one_of_other_threads_is_not_used_and_the_log_says_so(
    harm: str, healing: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = Workspace(tmp_path / "run")
    with pytest.raises(InterruptedRunError), counted(stop_at(2)):
        run(healing, work, to_export=False)
    if harm == "a bit":
        path = work.heal_checkpoints / "checkpoint" / "tensors.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with counted() as steps, caplog.at_level("INFO", "replaceme"):
        heal(healing if harm == "a bit" else healing.model_copy(update={"threads": 2}), work)
    assert steps[0] == 0
    assert "the training starts anew" in caplog.text


def test_a_training_that_may_not_fit_is_warned_of_before_it_begins(
    healing: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed = []
    for update in ({}, {"heal_optimizer": "muon"}, {"heal_weights": "after_cut"}, {"heal_weights": "lora"}):
        with monkeypatch.context() as patch:
            patch.setattr("replaceme.pipeline.inputs.free_memory", lambda _: 1000)
            inspect_inputs(healing.model_copy(update=update), Workspace(tmp_path / "run"))
        needed.append(next(message for message in caplog.messages if message.startswith("heal_tokens: the training takes")))
        caplog.clear()
    assert ["heal_optimizer: muon" in each for each in needed] == [True, False, True, False]
    assert ["heal_weights: lora" in each for each in needed] == [True, True, True, False]
    inspect_inputs(healing, Workspace(tmp_path / "run"))
    assert "the training takes" not in caplog.text


def test_processes_share_the_memory_that_a_training_may_take(
    healing: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed = healing_bytes(find_model(healing), healing)
    monkeypatch.setattr("replaceme.pipeline.inputs.free_memory", lambda _: 2 * ceil(needed))
    for processes, warned in ((2, False), (3, True)):
        inspect_inputs(healing.model_copy(update={"processes": processes}), Workspace(tmp_path / "run"))
        assert ("the training takes" in caplog.text) == warned


@pytest.mark.parametrize("kind", [*REPRESENTATIVES, "mixtral", "qwen2_moe"])
def test_a_training_takes_what_is_estimated_for_weights_at_least(
    kind: str, healing: Params, save_tiny: Callable[..., Model]
) -> None:
    source = save_tiny(kind)
    model = source.load()
    params = healing.model_copy(update={"batch_size": 1, "max_length": 1})
    own = sum(value.nbytes for value in model.parameters())
    for which in TRAINED:
        trained = sum(value.numel() for value in task_of(model, Edits("", [2, 3]), which, 3).trainable_parameters().values())
        update = {"heal_weights": which}
        estimated = healing_bytes(source, params.model_copy(update=update)) - own
        # The cut is in the middle; the norm after the layers is not counted, and states are those of one token.
        assert estimated == pytest.approx(16 * trained, rel=0.35)
        # Stacks of experts have both moments in any case.
        muon = healing_bytes(source, params.model_copy(update={**update, "heal_optimizer": "muon"})) - own
        saved = 0 if source.family().experts or which == "lora" else 4 * trained
        assert estimated - muon == pytest.approx(saved, rel=0.35)


@pytest.mark.parametrize(("words", "rows"), [(49_152, 1365), (128_256, 523), (400, 2048), (1 << 40, 1)])
def test_a_gpu_takes_as_many_rows_of_logits_as_have_so_many_bytes(words: int, rows: int) -> None:
    assert distillation._rows_at_once(torch.device("cuda"), words) == rows


def test_documents_of_the_calibration_are_known_by_content_not_by_name(
    healing: Params, text_file: Path, tmp_path: Path
) -> None:
    rows, copy = tmp_path / "rows.jsonl", tmp_path / "copy.jsonl"
    rows.write_text("".join(f'{{"text": "Row number {number} has its own words {number * 7}."}}\n' for number in range(400)))
    copy.write_bytes(rows.read_bytes())
    update = {"dataset": str(rows), "dataset_size": 12, "pack": True, "heal_dataset": (Source(str(copy), column="text"),)}
    params, work = healing.model_copy(update=update), Workspace(tmp_path / "run")
    run(params, work, to_export=False)
    calibrated = {tuple(document.tolist()) for document in Documents.load(work.documents).documents}
    trained = {tuple(document.tolist()) for document in Documents.load(work.edits / TEXT).documents}
    assert calibrated
    assert not calibrated & trained


def test_a_text_of_which_the_calibration_left_hardly_any_is_taken_whole(
    healing: Params, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (rows := tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"text": "Row number {number} has its own words {number * 7}."}}\n' for number in range(40))
    )
    update = {"dataset": str(rows), "dataset_size": 38, "pack": False, "heal_tokens": 3000}
    params, work = healing.model_copy(update=update), Workspace(tmp_path / "run")
    run(params, work, to_export=False)
    assert len(Documents.load(work.documents)) == 38
    assert len(draw_text(params, work, calibration_context(params, work))) == 40
    assert f"the calibration left hardly any text of {rows}; the training takes all of it" in caplog.text


def test_repair_and_heal_work_on_read_only_links(params: Params, tmp_path: Path) -> None:
    settings = {"method": "llm_streamline", "heal_tokens": 0}
    params, work = params.model_copy(update=settings), Workspace(tmp_path / "run")
    run(params, work, to_export=False)
    expected = sha256_below(work.healed)
    # As DVC links its outputs, to a cache on the same disk or on another one.
    for folder in (work.solution, work.repaired):
        kept = folder.rename(tmp_path / f"{folder.name}.kept")
        folder.mkdir()
        for number, path in enumerate(sorted(kept.iterdir())):
            path.chmod(0o444)
            (folder / path.name).symlink_to(path) if number % 2 else (folder / path.name).hardlink_to(path)
    repair(params, work)
    heal(params, work)
    assert sha256_below(work.healed) == expected
    for folder in (work.solution, work.repaired):
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / f"{folder.name}.kept").iterdir()} == {0o444}


def test_a_number_of_tokens_can_be_short_and_the_older_key_is_read() -> None:
    assert read_params(None, {"heal_tokens": "250k"}).heal_tokens == 250_000
    assert read_params(None, {"heal_tokens": "1.5M"}).heal_tokens == 1_500_000
    older = read_params(None, {"heal_epochs": 2})
    assert (older.heal_tokens, older.heal_weights) == (128_000, "outputs")
    assert read_params(None, {"heal_epochs": 0}).heal_tokens == 0
    assert read_params(None, {"heal_epochs": 0, "heal_tokens": 7}).heal_tokens == 7


def test_a_plan_without_steps_that_are_shared_keeps_no_checkpoint(tmp_path: Path) -> None:
    task = task_of(made_model(), Edits("", [*BLOCK.layers]))
    train(task, task.trainable_parameters(), StepPlan([[0]], [1e-3], [], "heal_learning_rate", BETAS, CLIP), tmp_path, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held_out_loss.tsv", "loss.tsv"]


def held_out_losses(monkeypatch: pytest.MonkeyPatch, before: float, shared: float, last: float) -> None:
    """Let trainings find these losses on held-out documents: before the first step, after the shared ones, after the last."""

    def mean_loss(run: TrainingRun, _documents: Any) -> float:
        if run.step in (run.plan.shared, len(run.plan.documents)):
            return shared if run.step == run.plan.shared else last
        return before

    monkeypatch.setattr(TrainingRun, "mean_loss", mean_loss)


@pytest.mark.usefixtures("checkpoint_at_each_chance")
@pytest.mark.parametrize("stopped", [2, 5], ids=["before the rate fell", "after it"])
def test_if_the_curve_turned_the_weights_before_the_rate_fell_are_kept(
    stopped: int, healing: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last, one, two = (Workspace(tmp_path / name) for name in ("last", "one", "two"))
    run(healing, last, to_export=False)
    for work in (one, two):
        run(healing.model_copy(update={"heal_tokens": 0}), work, to_export=False)
    held_out_losses(monkeypatch, 3.0, 1.0, 2.0)
    heal(healing, one)
    figures = read_json(one.metric("heal"))
    assert 0 < figures["kept_step"] < figures["training_steps"]
    assert figures["held_out_loss_last"] == 1.0
    assert sha256_below(one.healed) != sha256_below(last.healed)
    with counted(stop_at(stopped)), pytest.raises(InterruptedRunError):
        heal(healing, two)
    heal(healing, two)
    assert sha256_below(two.healed) == sha256_below(one.healed)


def test_a_training_that_made_the_model_worse_is_not_exported(
    healing: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workspace(tmp_path / "run")
    held_out_losses(monkeypatch, 1.0, 3.0, 2.0)
    run(healing, work)
    figures = read_json(work.metric("heal"))
    assert (figures["kept_step"], figures["held_out_loss_last"]) == (0, 2.0)
    assert sha256_below(work.healed)["edits.json"] == sha256_below(work.repaired)["edits.json"]
    assert compression_figures(healing, work)["trained"] is False
    assert " were trained on " not in (work.model / "README.md").read_text(encoding="utf-8")
    assert describe_healing(figures).endswith("from 1.000 to 2.000 nats per token: the weights from before it were kept.")


def test_a_disk_without_room_for_the_checkpoints_is_named_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(made_model(), Edits("", [*BLOCK.layers]))
    parameters, plan = task.trainable_parameters(), plan_steps(task.documents, [1.0], 60, 20, 1e-3)
    # Weights and both moments; the last checkpoint, the one that replaces it, and the shared one.
    needed = 3 * 12 * sum(parameter.numel() for parameter in parameters.values())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(ResourceError, match="the checkpoints of the training need another"):
        train(task, parameters, plan, tmp_path, "")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    train(task, parameters, plan, tmp_path, "")


def test_a_training_on_the_models_own_text_takes_its_share_of_it(
    healing: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "BATCH_ROWS", 2)
    (file := tmp_path / "text.txt").write_text(made_text(2000), encoding="utf-8")
    sources = (Source(str(file), 3.0), Source("self", 1.0))
    params, work = healing.model_copy(update={"heal_dataset": sources, "dataset": sources}), Workspace(tmp_path / "run")
    run(params, work, to_export=False)
    text = Documents.load(work.edits / TEXT)
    assert text.tokens_by_domain[1] / text.token_count == pytest.approx(0.25, abs=0.05)
    own = [tuple(document.tolist()) for document, domain in zip(text.documents, text.domains, strict=True) if domain == 1]
    # More than one batch, and no two texts alike.
    assert len({*own}) == len(own) > 2
    more = draw_text(params.model_copy(update={"heal_tokens": 1200}), work, calibration_context(params, work))
    longer = [tuple(document.tolist()) for document, domain in zip(more.documents, more.domains, strict=True) if domain == 1]
    assert longer[: len(own)] == own
    # Where it isn't named for the training, the model writes nothing.
    left_out = draw_text(params.model_copy(update={"heal_dataset": None}), work, calibration_context(params, work))
    assert {*left_out.domains} == {0}


@pytest.mark.usefixtures("checkpoint_at_each_chance")
def test_a_training_that_resumes_does_not_write_its_text_again(
    healing: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = healing.model_copy(update={"heal_dataset": (Source("self"),)})
    whole, stopped = Workspace(tmp_path / "whole"), Workspace(tmp_path / "stopped")
    run(params, whole, to_export=False)
    with counted(stop_at(2)), pytest.raises(InterruptedRunError):
        run(params, stopped, to_export=False)
    monkeypatch.setattr(own_text, "write_batches", Mock(side_effect=AssertionError("it writes")))
    # A quantized model writes another text.
    with pytest.raises(AssertionError, match="it writes"):
        draw_text(params.model_copy(update={"use_4bit": True}), stopped, calibration_context(params, stopped))
    loading = Mock(wraps=calibration_context)
    monkeypatch.setattr(find, "calibration_context", loading)
    heal(params, stopped)
    # The dense model is loaded once, for its text and the training.
    loading.assert_called_once()
    check(params, stopped)
    assert sha256_below(stopped.edits) == sha256_below(whole.edits)
