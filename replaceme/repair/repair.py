"""Repair: re-solve kept layers, whose inputs have changed because earlier layers were edited.

After the cut, the kept layers get other states than those they were trained on; their linears can make up for part of it. For
each kept layer in order, with ``h`` = state of the shortened model (rows are tokens, ``w = 1/‖target‖²``):

    attention's output projection:  toward (original state after the attention) − h,       λ = repair_ridge_attention
    the MLP's last linear:          toward (original layer output) − (new state after it), λ = repair_ridge_mlp

each by ridge regression from Gram sums, toward the present weights (``_correct_linears``; the penalty is
``Features.per_column``, 0 for the bias; the solve is ``replaceme.solvers.ridge.solve_correction``). The first correction
chooses the strength of all, down to none, by its error on held-out documents (``replaceme.solvers.held_out``). Where the
MLP is parallel to the attention, no state lies between them: both linears are solved together, from ``[A | G]``, toward
(original layer output) − h. With transform channels, the channels of the MLP before a cut are chosen here
(``replaceme.repair.channel_choice``); then its linears are solved for again. With several blocks, the method fits each later
one here, on the states that reach the layer before it.

With a budget that makes the MLPs narrower (``Plan.mlp_width``), the walk begins at the first layer: the channels of every kept
layer are chosen by the same rule from its own, before its MLP is repaired, and all blocks are fitted here.

All of it is one walk layer by layer. The states of both models lie in scratch files, with the inputs of the last linears of the
current layer. With these inputs kept, neither the attention nor the MLP runs again when only their last linears change. Only
one layer's sums and corrections are in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from replaceme.base.accelerators import float64_device, to_device
from replaceme.base.combinations import STEPWISE
from replaceme.base.documents import FOLDS, Batch, few_documents, folds_of
from replaceme.base.errors import renaming
from replaceme.base.files import temporary_folder
from replaceme.base.group import all_gather, compute_on_rank0, local_world_size, shard
from replaceme.base.parameters import Params
from replaceme.base.plan import Block, Plan
from replaceme.base.progress import logger, progress
from replaceme.base.ranks import rank
from replaceme.base.scratch import require_space, scratch
from replaceme.edits.channels import assemble_parameter, channels_of
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import product_format
from replaceme.methods.registry import METHODS
from replaceme.models.context import ModelContext
from replaceme.models.devices import require_resident
from replaceme.models.families import Family, Linear, inputs_of
from replaceme.repair.channel_choice import (
    TOKENS_PER_CHANNEL,
    Candidates,
    ScreenedCandidates,
    best_channels,
    likely_channels,
    max_candidates,
)
from replaceme.repair.resume import Checkpoints
from replaceme.repair.state import Repair, RepairState
from replaceme.solvers.held_out import Shrinkage, choose_shrinkage
from replaceme.solvers.quality import relative_residual, sse_change_of_correction
from replaceme.solvers.ridge import solve_correction
from replaceme.statistics.cut_statistics import STATISTICS, CutStatistic, add_correction
from replaceme.statistics.features import LINEARS, Features
from replaceme.statistics.sums import Sums, gram_format, token_weights
from replaceme.statistics.walk import Observer, RecordStates, Reducible, Signal, Signals, sum_tensors, walk

# Tokens whose states are updated at once.
TOKENS = 2048
# Largest sums of all folds together, in bytes.
FOLD_BYTES = 4 << 30

# The linears that are solved for at once, each with the parameter that is its ridge.
Ridges = Mapping[Linear, str]


def repair_layers(
    params: Params, context: ModelContext, edits: Edits, plan: Plan, checkpoints: Checkpoints
) -> tuple[list[Repair], dict[str, Any]]:
    """Add the repairs and the fits of later blocks to the edits; return the repairs, and how well those blocks fit.

    Args:
        params: the setting.
        context: the dense model and its calibration text.
        edits: as solved for the first block; they are added to.
        plan: the blocks, and the statistics that the method needs.
        checkpoints: an interrupted repair goes on at the last one.

    Raises:
        ResourceError: the states or the corrections do not fit on the disk.
    """
    state = _initial_state(params, context, edits, plan)
    finished = checkpoints.resume(state)
    if not finished:
        # Up to the first layer that changes, both models are the same.
        walk(context, [RecordStates(state.kept[0], ("input",), state.dense)], description="walking to the cut")
        state.shortened.copy_(state.dense)
    for number, layer in enumerate(progress(state.kept[finished:], "repairing layers", "layers"), start=finished + 1):
        repair_layer(state, layer)
        state.offload_corrections()
        if number < len(state.kept):
            checkpoints.save_if_due(state, number)
    return state.repairs, state.figures


def _initial_state(params: Params, context: ModelContext, edits: Edits, plan: Plan) -> RepairState:
    """Return a state with room for the states of both models."""
    layers, removed = context.layers, set(plan.removed_layers)
    first = 0 if plan.mlp_width else plan.blocks[0].layer_before_cut
    last = len(layers) - 1 if params.repair else max(block.layer_before_cut for block in plan.blocks)
    kept = [layer for layer in range(first, last + 1) if layer not in removed]
    # Nothing needs the states after the last layer, nor the inputs that update them.
    linears = LINEARS[: min(len(kept), 2)] if params.repair or params.transform in STEPWISE else ()
    # If any linear is corrected, the space for corrections counts the inputs of both.
    own_inputs = Features.of(layers[first], context.family, LINEARS if linears else (), plan.mlp_width).widths
    width, folder = context.width, context.folder
    widths = [width] * 3 + [own_inputs[linear] for linear in linears]
    shapes = [(context.documents.token_count_of(context.batch_size, shard()), each) for each in widths]
    dense, shortened, after_attention, *inputs = scratch(shapes, context.model.dtype, folder, "repair")
    # Each process writes its corrections to the same disk, layer by layer. The check waits until all have their states there.
    changed = len(kept) if params.repair else len(plan.blocks)
    all_gather(None)
    needed = local_world_size() * changed * width * sum(own_inputs.values()) * torch.float32.itemsize
    require_space(folder, needed, "repair keeps {} of corrections there, in addition to its states")
    known = dict(zip(linears, inputs, strict=True))
    return RepairState(params, context, edits, plan, kept, dense, after_attention, shortened, known)


def repair_layer(state: RepairState, layer: int) -> None:
    """Fit and correct a kept layer toward the dense model's states, and move the states of both models past it."""
    params, family, plan = state.params, state.family, state.plan
    block = {block.layer_before_cut: block for block in plan.blocks}.get(layer)
    solved = not plan.mlp_width and block == plan.blocks[0]
    # The attention of the first layer that changes has the same input as in the dense model.
    separate = params.repair and layer != state.kept[0] and not family.parallel
    targets: list[Observer] = [RecordStates(block.end - 1 if block else layer, ("output",), state.dense)]
    if separate:
        targets.append(RecordStates(layer, ("input", "attention"), state.after_attention))
    state.walk_dense(layer, targets)
    if separate:
        _correct_linears(state, layer, state.after_attention, {"attention_output": "repair_ridge_attention"})
    if block and not solved:
        _fit_later_block(state, block)
    if block and params.transform == "channels":
        _choose_channels(state, layer, range(layer, block.end), "refit_ridge")
    elif plan.mlp_width:
        _choose_channels(state, layer, range(layer, layer + 1), "repair_ridge_mlp")
    solves, advance = _planned_solves(params, family, bool(block)), layer != state.kept[-1]
    for number, ridges in enumerate(solves, start=1):
        _correct_linears(state, layer, state.dense, ridges, advance=advance and number == len(solves))
    if advance and not solves:
        state.walk_shortened(layer, [RecordStates(layer, ("output",), state.shortened)])


def _planned_solves(params: Params, family: Family, is_before_cut: bool) -> list[Ridges]:
    """Return the solves of a layer toward the dense model's state after it, in order."""
    mlp: Ridges
    if is_before_cut:
        mlp = {"mlp_output": "refit_ridge"}
        both: Ridges = {"attention_output": "refit_ridge", **mlp}
        # A new output projection changes the features of an MLP after it. Where that is parallel, the joint solution stands,
        # unless its channels have changed.
        if params.transform == "channels":
            return [both] if family.parallel else [mlp, both, mlp]
        return [mlp] if params.transform == "joint" and not family.parallel else []
    mlp = {"mlp_output": "repair_ridge_mlp"}
    if not params.repair:
        return []
    return [{"attention_output": "repair_ridge_attention", **mlp}] if family.parallel else [mlp]


def _choose_channels(state: RepairState, layer: int, window: range, ridge: str) -> None:
    """Give a layer's MLP the best channels of its own and of removed layers after it, with their original columns.

    Args:
        state: at this layer.
        layer: the layer.
        window: the layer, and the removed ones whose channels it may take.
        ridge: the parameter that is the ridge of the least squares that compares them.
    """
    module, edits = state.layers[layer], state.edits
    edits.transforms.pop(layer, None)
    edits.corrections.pop((layer, "mlp_output"), None)
    require_resident({source: state.layers[source] for source in window}, "whose channels are compared")
    count = inputs_of(state.family.linear_of(module, "mlp_output"))
    kept = state.plan.mlp_width or count
    documents = few_documents(state.context.documents, TOKENS_PER_CHANNEL * 2 * count)
    strength: float = getattr(state.params, ridge)
    dtype = gram_format(state.dense.dtype, state.context.model.device, strength)

    def keep(number: int, candidates: Tensor, observer: type[Candidates], criterion: Callable[..., Tensor]) -> Tensor:
        edits.channels[layer] = candidates
        sums = observer(layer, state.family, module, state.dense, dtype)
        state.walk_shortened(layer, [sums], documents)
        prior = assemble_parameter(state.family, state.layers, layer, candidates, f"{state.family.mlp_output}.weight").T
        gram, cross = (total.to(float64_device(total.device)) for total in (sums.gram, sums.cross))
        return candidates[compute_on_rank0(partial(criterion, gram, cross, prior, strength, number))]

    def best(candidates: Tensor) -> Tensor:
        if len(candidates) > (most := max_candidates(kept)):
            logger.info("repair: of %d channels, the %d likeliest are compared; more would not fit", len(candidates), most)
            candidates = keep(most, candidates, ScreenedCandidates, likely_channels)
        with renaming({"ridge": ridge}):
            return keep(kept, candidates, Candidates, best_channels)

    *others, chosen = (channels_of(source, count) for source in window)
    if not others:
        edits.channels[layer] = best(chosen)
        return
    # One layer's channels after the other's, each compared with the best so far.
    for more in progress([*reversed(others)], "choosing channels", "layers"):
        chosen = best(torch.cat([more, chosen]))
    edits.channels[layer] = chosen
    own = int((chosen[:, 0] == layer).sum())
    for name, number in (("mlp_channels", kept), ("own_mlp_channels", own)):
        state.figures[name] = state.figures.get(name, 0) + number
    logger.info(
        "repair: of the %d channels of layer %d's MLP, %d are its own and %d come from removed layers",
        kept, layer, own, kept - own,
    )  # fmt: skip


def _correct_linears(state: RepairState, layer: int, target: Tensor, ridges: Ridges, *, advance: bool = False) -> None:
    """Solve for linears of a layer; if ``advance``, move the shortened model's states past the corrected layer."""
    features = Features.of(state.layers[layer], state.family, [*ridges], state.plan.mlp_width)
    if state.shrinkage is None and _is_fitted(state.edits):
        state.shrinkage = Shrinkage()
    # One fold if the shrinkage is known; fewer folds if their sums would take too much memory.
    most = min(FOLDS, max(FOLD_BYTES // (8 * len(features) ** 2), 2)) if state.shrinkage is None else 1
    values: dict[Linear, float] = {linear: getattr(state.params, name) for linear, name in ridges.items()}
    penalty = features.per_column(values)
    dtype = gram_format(state.dense.dtype, state.context.model.device, float(penalty.min()))
    residual_sums = ResidualSums(layer, features, target, folds_of(state.context.documents, most), dtype)
    observers: list[Observer] = [residual_sums]
    if state.attention_layer != layer:
        observers.append(RecordStates(layer, ("attention_features",), state.inputs["attention_output"]))
    if advance:
        observers.append(RecordStates(layer, ("mlp_features",), state.inputs["mlp_output"]))
        observers.append(RecordStates(layer, ("output",), state.shortened))
    state.walk_shortened(layer, observers)
    state.attention_layer = layer
    folds = residual_sums.folds()
    if state.shrinkage is None:
        state.shrinkage = _agree_on_shrinkage(folds, penalty)
    shrinkage = state.shrinkage
    sums, penalty = sum_folds(folds), shrinkage.ridge_multiple * penalty
    del folds
    before, whole = float(sums["gap_squares"]), float(sums["output_squares"])
    after = before
    if shrinkage.scale:
        gram, cross = sums["gram"], sums["cross"]
        diagonal = gram.diagonal().clone()
        with renaming({"ridge": ridges[min(values, key=values.__getitem__)]}):
            change = compute_on_rank0(partial(solve_correction, gram, cross, penalty, overwrite=True))
        after += sse_change_of_correction(diagonal, cross, change, penalty, shrinkage.scale)
        change *= shrinkage.scale
        state.edits.correct_all(layer, features.parts(change))
        if advance:
            _add_change(state, features, change)
    residuals = relative_residual(before, whole), relative_residual(after, whole)
    state.repairs.append(Repair(layer, tuple(ridges), *residuals, shrinkage.ridge_multiple, shrinkage.scale))


def _is_fitted(edits: Edits) -> bool:
    """Return whether a map, or new weights of an MLP, is fitted to all documents: no document is held out then."""
    operators = (operator.ndim for operator in edits.operators.values())
    return bool(edits.transforms) or any(operators) or any(linear == "mlp_output" for _, linear in edits.corrections)


def _agree_on_shrinkage(folds: Sequence[Mapping[str, Tensor]], penalty: Tensor) -> Shrinkage:
    """Return how strong all corrections are, the same on every rank, and log it."""
    shrinkage = Shrinkage(
        *compute_on_rank0(lambda: torch.tensor(astuple(choose_shrinkage(folds, penalty)), dtype=torch.float64)).tolist()
    )
    if len(folds) > 1:
        logger.info(
            "repair: of the strengths tried, %g times the ridge and %.2f of the correction did best on held-out documents",
            shrinkage.ridge_multiple, shrinkage.scale,
        )  # fmt: skip
    else:
        logger.info("repair: corrections have their full strength: one document leaves none held out")
    return shrinkage


def _add_change(state: RepairState, features: Features, change: Tensor) -> None:
    """Add what a correction changes, its products with the recorded inputs, to the states that left the uncorrected layer."""
    dtype = product_format(state.shortened.dtype)
    for linear, weight, bias in features.parts((features.multiplier * change).to(dtype)):
        for rows, inputs in zip(state.shortened.split(TOKENS), state.inputs[linear].split(TOKENS), strict=True):
            rows += functional.linear(inputs.to(weight), weight, bias).to(rows)


def _fit_later_block(state: RepairState, block: Block) -> None:
    """Fit a later block by the method, on the shortened model's states at the cut and the dense model's at the end."""
    with temporary_folder(f"scratch-{rank()}-", state.context.folder) as folder:
        context = replace(state.context, folder=folder)
        observers = {statistic: STATISTICS[statistic](block, context) for statistic in state.plan.statistics}
        state.walk_shortened(block.layer_before_cut, [PairedStatistic(each, state.dense) for each in observers.values()])
        for statistic, observer in observers.items():
            save_file(observer.tensors(), folder / f"{statistic}.safetensors")
        solved = METHODS[state.params.method].solve(
            state.params, block, lambda statistic: load_file(folder / f"{statistic}.safetensors")
        )
    state.edits.title = solved.edits.title
    state.edits.transforms |= solved.edits.transforms
    state.edits.operators |= solved.edits.operators
    for (layer, linear), (weight, bias) in solved.edits.corrections.items():
        # The layer's attention may be repaired already: the solution is added to that repair.
        state.edits.correct(layer, linear, weight, bias)
    state.figures[f"block{state.plan.blocks.index(block)}"] = solved.figures


class ResidualSums:
    """Observer of what linears of a layer lack toward a target: sums over their features, float64.

    For each fold, ``gram`` = Σ w gᵀg (k, k), ``cross`` = Σ w gᵀe (k, d), ``gap_squares`` = Σ w ‖e‖² and ``output_squares`` =
    Σ w ‖target‖², with ``e = target − state after the last linear`` and ``w = 1/‖target‖²``. ``dtype`` is
    the format of the products of features (``gram_format``).
    """

    def __init__(self, layer: int, features: Features, target: Tensor, fold_of_token: Tensor, dtype: torch.dtype):
        self.layer, self.features, self.target, self.dtype = layer, features, target, dtype
        self.state: tuple[Signal, ...] = ("output",) if "mlp_output" in features.widths else ("input", "attention")
        self.fold_of_token = fold_of_token
        self.sums = [Sums() for _ in range(int(self.fold_of_token.max()) + 1)]

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return {self.layer: frozenset({*self.state, *self.features.signals})}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        state = sum_tensors(batch.real(signals[name]).float() for name in self.state)
        target = to_device(self.target[batch.tokens], state.device).float()
        w = token_weights(target)
        root = w.sqrt()
        g = self.features.columns(*(batch.real(signals[name]) for name in self.features.signals)).mul_(root)
        gap, own = (target - state) * root, self.fold_of_token[batch.positions]
        present = own.unique().tolist()
        for fold in present:
            rows = to_device((own == fold).nonzero()[:, 0], state.device) if len(present) > 1 else slice(None)
            add_correction(self.sums[fold], g[rows], gap[rows], target[rows], w[rows], self.dtype)

    def all_reduce(self) -> None:
        for sums in self.sums:
            sums.all_reduce()

    def folds(self) -> list[dict[str, Tensor]]:
        """Return the sums of each fold, once: they are kept no longer."""
        own, self.sums = self.sums, []
        return [sums.take_totals() for sums in own if sums.totals]


@torch.inference_mode()
def sum_folds(folds: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sums of all folds together, in the memory of the first."""
    first, *others = folds
    for fold in others:
        for name, own in first.items():
            own += fold[name]
    return dict(first)


class PairedStatistic:
    """Observer that gives a statistic of a cut the signals of one model before it and the target states of another."""

    def __init__(self, statistic: Any, target: Tensor):
        assert isinstance(statistic, CutStatistic)
        self.statistic, self.target = statistic, target

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        layer = self.statistic.block.layer_before_cut
        return {layer: self.statistic.signals()[layer]}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        self.statistic.observe(layer, signals, batch)
        self.statistic.add_targets(to_device(self.target[batch.tokens], signals["output"].device), batch)

    def all_reduce(self) -> None:
        assert isinstance(self.statistic, Reducible)
        self.statistic.all_reduce()
