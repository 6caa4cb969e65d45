"""The repair stage: edits whose features depend on an earlier solution, made on what the shortened model really computes.

Behind the cut, the kept layers get other states than those they were trained on, and their linears can make up for a part of
it. For each kept layer in order, with ``h`` = state of the shortened model (rows are tokens, ``w = 1/‖target‖²``):

    attention's output projection:  toward (original state behind the attention) − h,            λ = repair_ridge_attention
    the MLP's last linear:          toward (original layer output) − (new state behind it),      λ = repair_ridge_mlp

each by ridge regression from Gram sums, toward the present weights. Where the MLP is parallel to the attention, no state is
between them: both linears together, from ``[A | G]``, toward (original layer output) − h. A host whose MLP is to be made of the
best channels of the window gets them here (``replaceme.methods.channel_choice``), before its linears are solved for the last
time. With several blocks, each later one is fitted here by the method itself, on the states that reach its host. All of it is
one walk layer by layer: the states of both models wait in scratch files, with what enters the last linears of the layer at
hand, so that its attention is not computed again when they have changed, nor is its MLP for the states that leave it; and no
more than one layer's sums are in memory.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from replaceme.base.compute import require_resident
from replaceme.base.documents import Batch, Documents, few_documents
from replaceme.base.files import PARTIAL
from replaceme.base.params import Params
from replaceme.base.plan import Block, Plan
from replaceme.base.progress import logger, progress
from replaceme.base.scratch import scratch
from replaceme.edits.channels import assembled_parameter, channels_of
from replaceme.edits.edits import Edits
from replaceme.edits.unfused import product_format, unfused
from replaceme.methods.channel_choice import TOKENS_PER_CHANNEL, Candidates, best_channels
from replaceme.methods.registry import METHODS
from replaceme.models.families import Family, Linear, inputs_of
from replaceme.observers.features import LINEARS, Features
from replaceme.observers.statistics import STATISTICS, AtCut, Place, add_correction
from replaceme.observers.sums import Sums, token_weights
from replaceme.observers.walk import Keep, Observer, Signal, Signals, Start, total, walk
from replaceme.solvers.arguments import naming
from replaceme.solvers.quality import gained_by_ridge, relative
from replaceme.solvers.ridge import solve_correction

# The transforms of which a first solution of a host's linears is not all.
STEPWISE = ("joint", "channels")
# Tokens whose states move on at once.
TOKENS = 2048


@dataclass(frozen=True)
class Repair:
    """What linears were solved for at once, and the relative residual before and after, ``√(Σ w‖e‖² / Σ w‖target‖²)``."""

    layer: int
    linears: tuple[Linear, ...]
    before: float
    after: float


class Mender:
    """Walks both models side by side, layer by layer, and adds to the edits."""

    def __init__(self, params: Params, model: Any, family: Family, documents: Documents, edits: Edits, plan: Plan):
        """Take what is needed.

        Args:
            params: the setting.
            model: the dense model.
            family: its description.
            documents: calibration text.
            edits: as solved for the first block; they are added to.
            plan: the blocks, and the statistics that the method wants.
        """
        self.params, self.model, self.family, self.documents, self.edits, self.plan = (
            params, model, family, documents, edits, plan,
        )  # fmt: skip
        self.layers = family.decoder_layers(model)
        self.hosted = {block.host: block for block in plan.blocks}
        self.first = plan.blocks[0]
        self.repairs: list[Repair] = []
        self.figures: dict[str, Any] = {}

    def run(self, folder: Path | None = None) -> tuple[list[Repair], dict[str, Any]]:
        """Make the edits, with scratch files in ``folder``, and return what was repaired and how well later blocks fit."""
        self.folder = folder
        removed = set(self.plan.removed_layers)
        last = len(self.layers) - 1 if self.params.repair else max(self.hosted)
        self.kept = [layer for layer in range(self.first.host, last + 1) if layer not in removed]
        solves = self.params.repair or self.params.transform in STEPWISE
        # Behind the last layer, nobody asks for the states.
        host, linears = self.layers[self.first.host], LINEARS[: min(len(self.kept), 2)] if solves else ()
        widths = [int(self.model.config.hidden_size)] * 3 + [inputs_of(self.family.linear_of(host, each)) for each in linears]
        shapes = [(self.documents.token_count, width) for width in widths]
        self.dense, self.short, self.middle, *inputs = scratch(shapes, self.model.dtype, folder, "repair")
        self.inputs = dict(zip(linears, inputs, strict=True))
        # The layer whose attention's last inputs are known, and the one behind which the shortened model's states are.
        self.attended = self.left = -1
        self._walk([Keep(self.first.host, ("input",), self.dense)], None, description="walking to the cut")
        self.short.copy_(self.dense)
        for layer in progress(self.kept, "repairing layers", "layers"):
            self._mend(layer)
            if layer != self.kept[-1] and self.left != layer:
                self._walk([Keep(layer, ("output",), self.short)], layer, edited=True)
        return self.repairs, self.figures

    def _mend(self, layer: int) -> None:
        """Move the dense states on, and correct a kept layer toward them on the shortened model's states."""
        block = self.hosted.get(layer)
        ridges: dict[Linear, str] = {"attention_output": "repair_ridge_attention", "mlp_output": "repair_ridge_mlp"}
        # The host of the first block gets what it got in the dense model.
        attention = self.params.repair and block != self.first and not self.family.parallel
        watched: list[Observer] = [Keep(block.end - 1 if block else layer, ("output",), self.dense)]
        if attention:
            watched.append(Keep(layer, ("input", "attention"), self.middle))
        self._walk(watched, layer)
        if attention:
            self._correct(layer, self.middle, {"attention_output": ridges.pop("attention_output")})
        if block and block != self.first:
            self._fit(block)
        if block and self.params.transform in STEPWISE:
            self._fit_on(block)
        elif self.params.repair and not block:
            self._correct(layer, self.dense, ridges, last=True)

    def _fit_on(self, block: Block) -> None:
        """Go on from a joint solution of the host's linears: each step toward the weights, and on the features, of the last."""
        alone: dict[Linear, str] = {"mlp_output": "refit_ridge"}
        both: dict[Linear, str] = {"attention_output": "refit_ridge", **alone}
        chosen = self.params.transform == "channels"
        if chosen:
            self._choose(block)
        # A new output projection changes the features of an MLP behind it. Where that is parallel, the joint solution stands,
        # unless it was of other channels.
        steps = [alone, both, alone] if chosen else [alone]
        if self.family.parallel:
            steps = [both] if chosen else []
        for number, ridges in enumerate(steps, start=1):
            self._correct(block.host, self.dense, ridges, last=number == len(steps))

    def _choose(self, block: Block) -> None:
        """Make the host's MLP of the best channels of its own and of the layers that go, with the columns that they had."""
        host, layer = block.host, self.layers[block.host]
        self.edits.transforms.pop(host, None)
        self.edits.corrections.pop((host, "mlp_output"), None)
        window = range(host, block.end)
        require_resident({place: self.layers[place] for place in window}, "whose channels are compared")
        count = inputs_of(self.family.linear_of(layer, "mlp_output"))
        documents = few_documents(self.documents, TOKENS_PER_CHANNEL * 2 * count)
        chosen = channels_of(block.end - 1, count)
        for source in progress([*reversed(window[:-1])], "choosing channels", "layers"):
            candidates = self.edits.channels[host] = torch.cat([channels_of(source, count), chosen])
            sums = Candidates(host, self.family, layer, self.dense)
            self._walk([sums], host, edited=True, documents=documents)
            prior = assembled_parameter(self.family, self.layers, host, candidates, f"{self.family.mlp_output}.weight").T
            chosen = candidates[best_channels(sums.gram, sums.cross, prior, self.params.refit_ridge, count)]
        self.edits.channels[host] = chosen
        own = int((chosen[:, 0] == host).sum())
        for name, number in (("mlp_channels", count), ("own_mlp_channels", own)):
            self.figures[name] = self.figures.get(name, 0) + number
        logger.info(
            "repair: of the %d channels of layer %d's MLP, %d are its own and %d of layers that go",
            count,
            host,
            own,
            count - own,
        )

    def _correct(self, layer: int, target: Tensor, parameters: Mapping[Linear, str], last: bool = False) -> None:
        """Solve for linears of a layer; with its last step, the shortened model's states leave it.

        Args:
            layer: the layer.
            target: what its output, or its state after the attention, should be.
            parameters: the linears, each with the parameter that is its ridge.
            last: whether this is the layer's last step.
        """
        ridges: dict[Linear, float] = {linear: getattr(self.params, name) for linear, name in parameters.items()}
        features = Features.of(self.layers[layer], self.family, [*ridges])
        missing = Missing(layer, features, target)
        observers: list[Observer] = [missing]
        leaves = last and layer != self.kept[-1]
        if self.attended != layer:
            observers.append(Keep(layer, ("attention_features",), self.inputs["attention_output"]))
        if leaves:
            observers.append(Keep(layer, ("mlp_features",), self.inputs["mlp_output"]))
            observers.append(Keep(layer, ("output",), self.short))
        self._walk(observers, layer, edited=True)
        self.attended = layer
        sums, penalty = missing.sums.finished(), features.per_column(ridges)
        with naming(ridge=parameters[min(ridges, key=ridges.__getitem__)], sums="dtype", tokens="dataset_size"):
            change = solve_correction(sums["gram"], sums["cross"], penalty)
        before, whole = float(sums["gap_squares"]), float(sums["output_squares"])
        after = before + gained_by_ridge(sums["gram"], sums["cross"], change, penalty)
        self.edits.correct_all(layer, features.parts(change))
        self.repairs.append(Repair(layer, tuple(ridges), relative(before, whole), relative(after, whole)))
        if leaves:
            self._leave(features, change)
            self.left = layer

    def _leave(self, features: Features, change: Tensor) -> None:
        """Add to the shortened model's states what a change of their layer's last linears makes of their inputs."""
        dtype = product_format(self.short.dtype)
        for linear, weight, bias in features.parts((features.multiplier * change).to(dtype)):
            for rows, inputs in zip(self.short.split(TOKENS), self.inputs[linear].split(TOKENS), strict=True):
                rows += functional.linear(inputs.to(weight), weight, bias).to(rows)

    def _fit(self, block: Block) -> None:
        """Fit a later block by the method, on the shortened model's states at the host and the dense model's at the end."""
        with tempfile.TemporaryDirectory(prefix="scratch-", suffix=PARTIAL, dir=self.folder) as name:
            place = Place(block, self.layers[block.host], self.family, self.documents, Path(name))
            observers = {statistic: STATISTICS[statistic](place) for statistic in self.plan.statistics}
            self._walk([AtHost(each, self.dense) for each in observers.values()], block.host, edited=True)
            for statistic, observer in observers.items():
                save_file(observer.tensors(), place.folder / f"{statistic}.safetensors")
            solved = METHODS[self.params.method].solve(
                self.params, block, lambda statistic: load_file(place.folder / f"{statistic}.safetensors")
            )
        self.edits.transforms |= solved.edits.transforms
        self.edits.operators |= solved.edits.operators
        for (layer, linear), (weight, bias) in solved.edits.corrections.items():
            # Its attention may be repaired already: the solution is what comes on top.
            self.edits.correct(layer, linear, weight, bias)
        self.figures[f"block{self.plan.blocks.index(block)}"] = solved.figures

    def _walk(
        self,
        observers: Sequence[Observer],
        layer: int | None,
        *,
        edited: bool = False,
        documents: Documents | None = None,
        description: str | None = None,
    ) -> None:
        """Walk through the dense model or the shortened one, from a layer that the states enter; None is the whole model."""
        start = None
        if layer is not None:
            known = self.inputs["attention_output"] if edited and layer == self.attended else None
            start = Start(layer, self.short if edited else self.dense, known)
        # What stands before the layer at which the walk begins computes nothing: no MLP need be assembled there.
        channels = {place: each for place, each in self.edits.channels.items() if layer is None or place >= layer}
        with unfused(self.model, self.family, replace(self.edits, channels=channels)) if edited else nullcontext():
            walk(
                self.model, self.family, documents or self.documents, observers,
                batch_size=self.params.batch_size, description=description, start=start,
            )  # fmt: skip


class Missing:
    """Observer of what linears of a layer lack toward a target: sums over their features, float64.

    ``gram`` = Σ w gᵀg (k, k), ``cross`` = Σ w gᵀe (k, d), ``gap_squares`` = Σ w ‖e‖² and ``output_squares`` = Σ w ‖target‖²,
    with ``e = target − state behind the last linear`` and ``w = 1/‖target‖²``.
    """

    def __init__(self, layer: int, features: Features, target: Tensor):
        self.layer, self.features, self.target = layer, features, target
        self.state: tuple[Signal, ...] = ("output",) if "mlp_output" in features.widths else ("input", "attention")
        self.sums = Sums()

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        return {self.layer: frozenset({*self.state, *self.features.signals})}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        state = total(batch.real(signals[name]).float() for name in self.state)
        target = self.target[batch.tokens].to(state.device).float()
        w = token_weights(target)
        root = w.sqrt()
        g = self.features.columns(*(batch.real(signals[name]) for name in self.features.signals)).mul_(root)
        add_correction(self.sums, g, (target - state) * root, target, w)


class AtHost:
    """Observer that gives a statistic of a cut the host's signals of one model and the target states of another."""

    def __init__(self, statistic: Any, target: Tensor):
        assert isinstance(statistic, AtCut)
        self.statistic, self.target = statistic, target

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        host = self.statistic.block.host
        return {host: self.statistic.wants()[host]}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        self.statistic.observe(layer, signals, batch)
        self.statistic.meet(self.target[batch.tokens].to(signals["output"].device), batch)
