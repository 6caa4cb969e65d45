"""Activation statistics of the planned blocks, in one pass that stops at the last layer needed.

For a block with host ``i`` and end ``e`` (ReplaceMe, section 3; rows are real tokens):

    M = what the host's MLP adds,  Z = h_i − M = everything else that leaves the host,
    H = h_{e−1} = what the shortened model should have at the cut,  Y = H − Z.

``gram`` keeps ``MᵀM``, ``MᵀY`` and three sums of squares: all that least squares needs, d × d whatever the number of
tokens, and additive over disjoint documents. ``sample`` keeps a few evenly spaced tokens, for figures that are not sums
of squares. ``tokens`` keeps every token on disk, for losses that no sum can stand for. A statistic is an observer with a
``tensors`` method and one line in ``STATISTICS``.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from replaceme.compute import resolve_device, use_threads
from replaceme.documents import Batch, Documents
from replaceme.families import Family
from replaceme.files import new_folder
from replaceme.forward import Observer, Signal, Signals, walk
from replaceme.models import recorded_model
from replaceme.params import Params
from replaceme.plan import Block, Plan
from replaceme.progress import logger
from replaceme.token_shards import ShardWriter
from replaceme.workspace import Workspace

SAMPLED_TOKENS = 2048
# Below this many tokens a dimension, the fit follows the sample's noise.
TOKENS_PER_DIMENSION = 8


class Statistic(Observer, Protocol):
    """An observer whose result is a few tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the result, at the processor."""
        ...


class AtCut:
    """Brings together a block's M, Z and H, which pass at different layers."""

    def __init__(self, block: Block):
        self.block = block

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        return {self.block.host: frozenset({"mlp", "output"}), self.block.end - 1: frozenset({"output"})}

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        if layer == self.block.host:
            batch.scratch[self, "mlp"] = batch.real(signals["mlp"])
            batch.scratch[self, "host"] = batch.real(signals["output"])
        else:
            added, left = batch.scratch.pop((self, "mlp")), batch.scratch.pop((self, "host"))
            self.take(added, left, batch.real(signals["output"]), batch)

    def take(self, added: Tensor, left: Tensor, target: Tensor, batch: Batch) -> None:
        """Receive M, h_host = Z + M and H of the batch's real tokens, each (tokens, d)."""
        raise NotImplementedError


class Gram(AtCut):
    """``MᵀM`` and ``MᵀY`` (d, d), and the scalars ``ΣY²``, ``ΣH²``, ``Σ(H − h_host)²`` and the number of tokens; float64."""

    def __init__(self, block: Block):
        super().__init__(block)
        self.sums: dict[str, Tensor] = {}

    def take(self, added: Tensor, left: Tensor, target: Tensor, batch: Batch) -> None:
        M, H = added.double(), target.double()
        gap = H - left.double()
        Y = gap + M
        parts = {
            "gram": M.T @ M,
            "cross": M.T @ Y,
            "target_squares": Y.square().sum(),
            "output_squares": H.square().sum(),
            "gap_squares": gap.square().sum(),
            "tokens": torch.tensor(float(len(M)), dtype=torch.float64),
        }
        for name, part in parts.items():
            self.sums[name] = self.sums[name].add_(part) if name in self.sums else part

    def tensors(self) -> dict[str, Tensor]:
        return {name: total.cpu() for name, total in self.sums.items()}


class Sample(AtCut):
    """M, Z and H of at most ``SAMPLED_TOKENS`` tokens, evenly spaced over the walk; each (n, d) float32."""

    def __init__(self, block: Block, token_count: int):
        super().__init__(block)
        self.step = -(-token_count // SAMPLED_TOKENS)
        self.kept: dict[str, list[Tensor]] = {"added": [], "rest": [], "target": []}

    def take(self, added: Tensor, left: Tensor, target: Tensor, batch: Batch) -> None:
        start = -batch.first_token % self.step
        M = added[start :: self.step].float()
        self.kept["added"].append(M.cpu())
        self.kept["rest"].append((left[start :: self.step].float() - M).cpu())
        self.kept["target"].append(target[start :: self.step].float().cpu())

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.kept.items()}


class TokenDump(AtCut):
    """Every token's M and Y, or in the accurate form its M, h_host and H, in shards; the result says how many each holds."""

    def __init__(self, place: "Place", accurate: bool):
        super().__init__(place.block)
        self.accurate = accurate
        names = ("added", "left", "target") if accurate else ("added", "goal")
        self.shards = ShardWriter(place.folder, place.number, names, place.documents.token_count)

    def take(self, added: Tensor, left: Tensor, target: Tensor, batch: Batch) -> None:
        if self.accurate:
            self.shards.add(added, left, target)
        else:
            self.shards.add(added, target.float() - left.float() + added.float())

    def tensors(self) -> dict[str, Tensor]:
        return {"counts": self.shards.finish()}


@dataclass(frozen=True)
class Place:
    """Where and of what a statistic is taken.

    Attributes:
        block: the layers that go.
        host: the module of the kept layer in front of them.
        family: where its parts are.
        documents: what is walked.
        folder: where results too large for memory may be written; they stay with the other statistics.
        number: the block's, in the plan's order.
    """

    block: Block
    host: nn.Module
    family: Family
    documents: Documents
    folder: Path
    number: int


STATISTICS: dict[str, Callable[[Place], Statistic]] = {
    "gram": lambda place: Gram(place.block),
    "sample": lambda place: Sample(place.block, place.documents.token_count),
    "tokens": lambda place: TokenDump(place, accurate=False),
    "tokens_accurate": lambda place: TokenDump(place, accurate=True),
}


def observe_activations(params: Params, work: Workspace) -> None:
    """Take the planned statistics and write one safetensors file for each."""
    use_threads(params.threads)
    plan, documents = Plan.load(work.plan), Documents.load(work.documents)
    with new_folder(work.statistics) as folder:
        if not plan.statistics:
            logger.info("activations: the method wants no statistics")
            # DVC keeps no empty folder.
            save_file({"none": torch.zeros(1)}, folder / "none.safetensors")
            return
        source = recorded_model(params, work.model_input)
        model = source.load(params.dtype, resolve_device(params.device), params.use_4bit)
        taken = take_statistics(model, source.family(), documents, plan, params.batch_size, folder)
        for name, tensors in taken.items():
            save_file(tensors, folder / f"{name}.safetensors")
    width, tokens = int(source.config().hidden_size), documents.token_count
    stop = max(block.end for block in plan.blocks)
    logger.info("activations: %s over %d tokens, layers 0 to %d", " and ".join(plan.statistics), tokens, stop - 1)
    if tokens < TOKENS_PER_DIMENSION * width:
        logger.warning(
            "dataset_size: %d tokens are few for a width of %d; the fit wants at least %d, so raise dataset_size or alpha",
            tokens, width, TOKENS_PER_DIMENSION * width,
        )  # fmt: skip


def take_statistics(
    model: Any, family: Family, documents: Documents, plan: Plan, batch_size: int, folder: Path | None = None
) -> dict[str, dict[str, Tensor]]:
    """Return ``{"gram-0": tensors, ...}``: each planned statistic of each block, numbered in the plan's order.

    What is too large for memory is written into ``folder``; None is the system's temporary folder.
    """
    layers = family.decoder_layers(model)
    folder = folder or Path(tempfile.gettempdir())
    observers: dict[str, Statistic] = {
        f"{name}-{number}": STATISTICS[name](Place(block, layers[block.host], family, documents, folder, number))
        for number, block in enumerate(plan.blocks)
        for name in plan.statistics
    }
    walk(model, family, documents, list(observers.values()), batch_size=batch_size, description="observing activations")
    return {name: observer.tensors() for name, observer in observers.items()}
