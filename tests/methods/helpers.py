"""The edits as the stages solve and repair make them, for tests of repair, channels and healing; and what is refused."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from replaceme.base.documents import Documents
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params, read_params
from replaceme.base.plan import Block, Plan
from replaceme.edits.edits import Edits
from replaceme.export.save import save_pruned
from replaceme.export.verification import verify_export
from replaceme.methods.method import MethodContext, Solved
from replaceme.methods.refusals import check_model
from replaceme.methods.registry import METHODS
from replaceme.models.families import Family, family_of
from replaceme.models.model import Model
from replaceme.repair.repair import repair_layers
from replaceme.repair.resume import Checkpoints
from replaceme.repair.state import Repair
from replaceme.running.workspace import Workspace
from replaceme.statistics.cut_statistics import take_statistics
from tests.conftest import WIDTH, made_model
from tests.helpers import context_of, many_documents

BLOCK = Block(2, 4)


class NoCheckpoints(Checkpoints):
    """Checkpoints that are never written."""

    def resume(self, state: Any) -> int:
        return 0

    def save_if_due(self, state: Any, finished: int) -> None:
        pass


NO_CHECKPOINTS = NoCheckpoints(Path(), "")
RunRepair = Callable[..., tuple[list[Repair], dict[str, Any]]]


def solved(
    model: Any, documents: Documents, blocks: tuple[Block, ...], mlp_width: int | None = None, **options: Any
) -> tuple[Edits, RunRepair]:
    """Return the edits as solve makes them, and their repair, to be called with a scratch folder and checkpoints, or none."""
    params = read_params(None, {"batch_size": 4, **options})
    context, method = context_of(model, documents), METHODS[params.method]
    plan = Plan(blocks, method.statistics(params), mlp_width)
    edits = Edits("", [])
    if not mlp_width:
        taken = take_statistics(context, blocks[0], plan.statistics)
        edits = method.solve(params, blocks[0], taken.__getitem__).edits
    edits.removed_layers = plan.removed_layers

    def run_repair(
        folder: Path | None = None, checkpoints: Checkpoints = NO_CHECKPOINTS
    ) -> tuple[list[Repair], dict[str, Any]]:
        own = replace(context, folder=folder, batch_size=params.batch_size)
        return repair_layers(params, own, edits, plan, checkpoints)

    return edits, run_repair


def solved_alone(
    method: str, model: Any, documents: Documents, block: Block = BLOCK, batch_size: int = 4, **options: Any
) -> Solved:
    """Return a method's solution of a block from its statistics, with the block removed."""
    params, declared = read_params(None, {"method": method, **options}), METHODS[method]
    taken = take_statistics(context_of(model, documents, batch_size), block, declared.statistics(params))
    made = declared.solve(params, block, taken.__getitem__)
    made.edits.removed_layers = [*block.layers]
    return made


def method_context(
    model: Any, documents: Documents, folder: Path, blocks: tuple[Block, ...] = (), **options: Any
) -> MethodContext:
    """Return the inputs of ``fit_on_model`` with these parameters, for edits that remove the blocks."""
    plan = Plan(blocks, ())
    params = read_params(None, {"batch_size": 4, **options}, METHODS)
    own = {"params": params, "plan": plan, "edits": Edits("", plan.removed_layers), "output": folder, "checkpoints": folder}
    return MethodContext(model, family_of(model.config), documents, params.batch_size, folder=folder, **own)


def assert_repaired_and_exported(source: Model, edits: Edits, plan: Plan, folder: Path, method: str) -> set[int]:
    """Repair the edits of a method, require that each repair helps and that the export is exact; return the repaired layers."""
    params, texts = read_params(None, {"method": method, "repair": True, "batch_size": 4}), many_documents(12)
    repairs, _ = repair_layers(params, context_of(source.load(), texts), edits, plan, NO_CHECKPOINTS)
    assert repairs
    assert all(each.after < each.before for each in repairs)
    save_pruned(source, edits, folder)
    figures = verify_export(source, Model(folder, "pruned"), edits, texts)
    assert figures["hidden_error_mean"] < figures["tolerance"]
    return {each.layer for each in repairs}


def same_weights(a: Any, b: Any, tolerance: float = 1e-3) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(
        torch.allclose(one, other, rtol=tolerance, atol=tolerance * float(other.detach().abs().max())) for one, other in pairs
    )


def run_stages(params: Params, work: Workspace, *names: str) -> None:
    """Run stages by name, in this process."""
    for name in names:
        importlib.import_module(f"replaceme.pipeline.{name}").STAGE.run(params, work)


def model_refusals(given: Any, **options: Any) -> list[str]:
    """Return the sentences that refuse options for a model: ``given``, a tiny one of that name, or one of that description."""
    model = made_model(given) if isinstance(given, str) else given
    if isinstance(given, Family):
        model = SimpleNamespace(config=SimpleNamespace(model_type="x", hidden_size=WIDTH))
    source: Any = SimpleNamespace(config=lambda: model.config, skeleton=lambda config: model)
    try:
        check_model(read_params(None, options), source, given if isinstance(given, Family) else family_of(model.config))
    except ParameterError as refusal:
        return refusal.problems
    return []
