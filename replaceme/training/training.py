"""The training loop: weights trained on documents, a few documents per step, for any task.

AdamW, or for matrices Muon; each step's documents and learning rate are known before it begins
(``StepPlan``). Weights, moments and gradients are float32 whatever the model's dtype; dropout is off.

An interrupted run resumes from its last checkpoint and ends with the same result as an uninterrupted one. A checkpoint belongs
to any plan whose steps before it are the same (documents and rates). So a longer training goes on from a shorter one where the
rate of both was constant (``StepPlan.shared``), to the bits of a run of its own.

Processes can share a training: each step's documents are divided, and losses and gradients added up, so that all take the same
step. The first one writes the checkpoints, and all read them.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from replaceme.base.accelerators import to_device
from replaceme.base.checkpoints import STATE, TENSORS, CheckpointTimer, checkpoint_key, load_checkpoint, save_checkpoint
from replaceme.base.documents import Batch, Documents
from replaceme.base.errors import SolveError
from replaceme.base.files import read_remembered, round_floats
from replaceme.base.group import all_gather, all_reduce_sum, shard
from replaceme.base.progress import logger, progress
from replaceme.base.ranks import rank
from replaceme.base.scratch import require_space
from replaceme.models.devices import describe_environment
from replaceme.training.muon import Muon

# Rows (number of steps taken before, loss), by the name of the curve: of a step's batch, or of the held-out documents.
Curves = dict[str, list[tuple[int, float]]]
CURVES = ("loss", "held_out_loss")

# AdamW's weight decay (LLM-Streamline's public code, arXiv 2403.19135).
WEIGHT_DECAY = 1e-3
# Seed of the documents' order.
SEED = 0
# Folders of checkpoints: the last one, and that after the steps that a longer training has too.
LAST, SHARED = "checkpoint", "shared"
# What an optimizer keeps for each parameter; and the bytes of a checkpoint for each weight: itself, and its moments.
STATE_PARTS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}
CHECKPOINT_BYTES = {torch.optim.AdamW: 12, Muon: 8}


@dataclass(frozen=True)
class StepPlan:
    """The steps of a training, one by one.

    Attributes:
        documents: of each step, by position in the task's text.
        rates: the learning rate of each step.
        held_out: documents that no step takes.
        rate_name: name of the parameter that sets the learning rate, for messages.
        betas: AdamW's.
        clip: the gradient norm to clip at.
        evaluated: the steps before which the loss on those held out is evaluated; it is after the last one too.
        shared: the number of first steps that a longer training has too; a checkpoint after them is kept. Its weights are the
            result if the held-out loss is evaluated there and lower than after the last step.
        muon: the parameters that learn by Muon instead of AdamW, by name: matrices.
        muon_products: the format of its products.
    """

    documents: Sequence[Sequence[int]]
    rates: Sequence[float]
    held_out: Sequence[int]
    rate_name: str
    betas: tuple[float, float]
    clip: float
    evaluated: Collection[int] = (0,)
    shared: int = 0
    muon: Collection[str] = ()
    muon_products: torch.dtype = torch.bfloat16


class DocumentBatches:
    """Documents by position in a text.

    Args:
        documents: the text.
        device: of the batches.
    """

    def __init__(self, documents: Documents, device: torch.device):
        self.device = device
        self.texts = documents.documents
        self.lengths = torch.tensor([len(text) for text in self.texts])

    def batch(self, documents: Sequence[int]) -> Batch:
        """Return documents as one padded batch."""
        texts = [self.texts[index].long() for index in documents]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return Batch(to_device(ids, self.device), torch.tensor([len(text) for text in texts]), 0, 0)

    def token_count(self, documents: Sequence[int]) -> int:
        """Return the number of tokens of documents."""
        return int(self.lengths[[*documents]].sum())


class TrainingTask(Protocol):
    """What is learnt: a loss as a function of the weights."""

    @property
    def batches(self) -> DocumentBatches:
        """The text, as batches."""
        ...

    def loss(self, parameters: Mapping[str, Tensor], documents: Sequence[int]) -> float:
        """Return the mean loss over the real tokens of documents, with these weights; add its gradients where they are enabled.

        Where processes share the training, it is this process's part of it: those of all add up to the mean.

        Args:
            parameters: the trained weights, float32.
            documents: positions in a walk.
        """
        ...

    def training_context(self) -> AbstractContextManager[None]:
        """Return a context that prepares the model for the training and restores it afterwards."""
        ...


def train(
    task: TrainingTask, parameters: dict[str, Tensor], plan: StepPlan, folder: Path, key: str
) -> tuple[Curves, dict[str, Any]]:
    """Train weights.

    If the loss on the held-out documents was lower after the shared steps than after the last one, the weights after the former
    are kept.

    Args:
        task: the task to learn.
        parameters: the initial values, float32 with gradients enabled; they are changed in place.
        plan: its steps.
        folder: folder for checkpoints and, while it runs, the curves.
        key: digest of all that the training depends on besides the plan (``replaceme.base.checkpoints``).

    Returns:
        The curves, and figures of the training.

    Raises:
        SolveError: the loss is not finite.
    """
    with task.training_context():
        run = TrainingRun(task, parameters, plan, folder, key)
        left = range(run.step, len(plan.documents))
        for step in progress(left, "training", "steps", note=run.describe):
            run.take_step(step)
        run.evaluate(len(plan.documents))
        kept = run.take_better()
    return run.curves, _summarize(run.curves, parameters, kept)


class TrainingRun:
    """A training in progress."""

    def __init__(self, task: TrainingTask, parameters: dict[str, Tensor], plan: StepPlan, folder: Path, key: str):
        self.task, self.parameters, self.plan, self.folder, self.key = task, parameters, plan, folder, key
        self.optimizers = make_optimizers(parameters, plan)
        self.step = self.tokens = 0
        self.curves: Curves = {name: [] for name in CURVES}
        self._resume()
        if rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_curves(folder, self.curves)
            self._require_space()
        self.timer = CheckpointTimer()

    def take_step(self, step: int) -> None:
        """Take one step."""
        self.evaluate(step)
        documents = self.plan.documents[step]
        self.record_loss("loss", step, sum(all_gather(self.task.loss(self.parameters, documents))))
        all_reduce_sum({name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None})
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.plan.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.rates[step]
            optimizer.step()
            optimizer.zero_grad()
        self.step = step + 1
        self.tokens += self.task.batches.token_count(documents)
        if rank() == 0:
            if self.step == self.plan.shared:
                self.save(SHARED)
            elif self.timer.is_due():
                self.save(LAST)

    def evaluate(self, step: int) -> None:
        """Record the held-out loss before the steps of the plan, and after the last."""
        if self.plan.held_out and (step == len(self.plan.documents) or step in self.plan.evaluated):
            self.record_loss("held_out_loss", step, self.mean_loss(self.plan.held_out))

    def take_better(self) -> int:
        """Take the weights after the shared steps, if their held-out loss is lower; return the number of steps taken in all."""
        losses, shared = dict(self.curves["held_out_loss"]), self.plan.shared
        if shared and shared in losses and losses[shared] < losses[self.step]:
            checkpoint = load_checkpoint(self.folder / SHARED, self._key_after(shared))
            if all(all_gather(checkpoint is not None)) and checkpoint:
                self._restore_weights(checkpoint[1])
                return shared
        return self.step

    def mean_loss(self, documents: Sequence[int]) -> float:
        """Return the mean loss on documents, all tokens weighted equally."""
        losses, tokens = 0.0, 0
        # Those of the first step are also a longer training's, so that its sums have the same bits.
        most = max(map(len, self.plan.documents[:1]), default=1)
        with torch.no_grad():
            for start in range(0, len(documents), most):
                chosen = documents[start : start + most]
                count = self.task.batches.token_count(chosen)
                losses, tokens = losses + count * self.task.loss(self.parameters, chosen), tokens + count
        return sum(all_gather(losses / tokens))

    def record_loss(self, name: str, step: int, value: float) -> None:
        """Append a loss to a curve. Raises SolveError if it is not finite."""
        if not math.isfinite(value):
            raise SolveError(f"{self.plan.rate_name}: the loss of the training is {value} at step {step}; use a lower one.")
        self.curves[name].append((step, value))
        if rank() == 0:
            add_row(self.folder, name, step, value)

    def describe(self) -> str:
        """Return how far the training is."""
        return f"{self.tokens:,} tokens, loss {self.curves['loss'][-1][1]:.4g}"

    def save(self, checkpoint: str) -> None:
        """Write a checkpoint into the folder with this name."""
        with self.timer.saving():
            tensors = {f"weight.{name}": parameter for name, parameter in self.parameters.items()}
            for name, part, kept in self._optimizer_states():
                tensors[f"{part}.{name}"] = kept[part]
            state = {"step": self.step, "curves": self.curves}
            save_checkpoint(self.folder / checkpoint, self._key_after(self.step), state, tensors)

    def _require_space(self) -> None:
        """Raise ResourceError if the disk has no room for the last checkpoint, its successor and the shared one."""
        size = sum(
            CHECKPOINT_BYTES[type(optimizer)] * sum(parameter.numel() for parameter in optimizer.param_groups[0]["params"])
            for optimizer in self.optimizers
        )
        files = [self.folder / name / TENSORS for name in (LAST, SHARED)]
        # What this training will replace.
        written = sum(min(path.stat().st_size, size) for path in files if path.is_file())
        needed = size * (3 if self.plan.shared else 2) - written
        require_space(self.folder, needed, "the checkpoints of the training need another {}")

    def _key_after(self, steps: int) -> str:
        """Return the key of a checkpoint after so many steps: it says what these were, and what is held out."""
        text = chain(chain.from_iterable(self.plan.documents[:steps]), self.plan.held_out)
        settings = {
            "key": self.key,
            "rates": [*self.plan.rates[:steps]],
            "sizes": [*map(len, self.plan.documents[:steps]), len(self.plan.held_out)],
            "muon": [*self.plan.muon, str(self.plan.muon_products)],
        }
        return checkpoint_key(settings, (self.task.batches.texts[index] for index in text))

    def _resume(self) -> None:
        """Continue from the latest checkpoint whose steps are this plan's, if all processes find it."""
        found = [(name, read_remembered(self.folder / name / STATE).get("step", 0)) for name in (LAST, SHARED)]
        for name, step in sorted(found, key=lambda each: -each[1]):
            checkpoint = None
            if 0 < step <= len(self.plan.documents):
                checkpoint = load_checkpoint(self.folder / name, self._key_after(step))
            if all(all_gather(checkpoint is not None)) and checkpoint:
                self._restore(*checkpoint)
                logger.info("training: resumes after step %d of %d of an earlier run", self.step, len(self.plan.documents))
                return
        if latest := max(step for _, step in found):
            logger.info(
                "training: the checkpoint in %s, after step %d, belongs to another setting, text, code, device or number of "
                "threads or processes, or is damaged; the training starts anew", self.folder, latest,
            )  # fmt: skip

    def _restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.step = state["step"]
        self.tokens = sum(map(self.task.batches.token_count, self.plan.documents[: self.step]))
        self.curves = {name: [*map(tuple, rows)] for name, rows in state["curves"].items()}
        self._restore_weights(tensors)
        for name, part, kept in self._optimizer_states():
            # AdamW keeps its step count on the CPU.
            kept[part] = tensors[f"{part}.{name}"].to("cpu" if part == "step" else self.parameters[name].device)

    def _optimizer_states(self) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """Yield a parameter's name, a part of its optimizer's state, and that state, for all of them."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    for part in STATE_PARTS[type(optimizer)]:
                        yield name, part, optimizer.state[parameter]

    def _restore_weights(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight.{name}"])


def make_optimizers(parameters: Mapping[str, Tensor], plan: StepPlan) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a training's parameters, each with one group, which has their names."""
    muon = {*plan.muon}
    matrices = [(name, parameter) for name, parameter in parameters.items() if name in muon]
    others = [(name, parameter) for name, parameter in parameters.items() if name not in muon]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(Muon(matrices, plan.muon_products, WEIGHT_DECAY))
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=0.0, betas=plan.betas, weight_decay=WEIGHT_DECAY))
    return optimizers


def write_curves(folder: Path, curves: Curves) -> None:
    """Write ``NAME.tsv`` for each curve, with the rows so far: a table in DVCLive's format, extended while a training runs."""
    for name in CURVES:
        (folder / f"{name}.tsv").write_text(f"step\t{name}\n", encoding="utf-8")
        for step, value in curves.get(name, ()):
            add_row(folder, name, step, value)


def add_row(folder: Path, name: str, step: int, value: float) -> None:
    """Append a row to a curve."""
    with (folder / f"{name}.tsv").open("a", encoding="utf-8") as table:
        table.write(f"{step}\t{round_floats(value, 9)}\n")


def _summarize(curves: Curves, parameters: Mapping[str, Tensor], kept: int) -> dict[str, Any]:
    """Return and log the figures of a training. The loss of one batch is noisy, so the first and last eighths are averaged.

    Args:
        curves: its curves.
        parameters: what was trained.
        kept: the number of steps after which the weights were kept.
    """
    losses, held_out = [loss for _, loss in curves["loss"]], dict(curves["held_out_loss"])
    part = max(len(losses) // 8, 1)
    figures = {
        "trained_parameters": sum(parameter.numel() for parameter in parameters.values()),
        "training_steps": len(losses),
        "training_loss_first": fmean(losses[:part]),
        "training_loss_last": fmean(losses[-part:]),
    }
    said = f"loss {figures['training_loss_first']:.4g} to {figures['training_loss_last']:.4g}"
    if held_out:
        figures |= {"kept_step": kept, "held_out_loss_first": held_out[0], "held_out_loss_last": held_out[kept]}
        said += f", on held-out documents {held_out[0]:.4g} to {held_out[kept]:.4g}"
    logger.info("training: %d steps, %s", len(losses), said)
    if held_out and held_out[kept] >= held_out[0]:
        logger.warning("training: the loss on held-out documents did not fall; a lower learning rate or more text may help")
    elif kept < len(losses):
        logger.warning(
            "training: the loss on held-out documents rose to %.4g after step %d, whose weights are kept; fewer tokens or"
            " more text may help", held_out[len(losses)], kept,
        )  # fmt: skip
    return figures


def checkpoint_settings(device: torch.device) -> dict[str, Any]:
    """Return what a training depends on besides the task, the plan and the parameters, for a checkpoint's key.

    Any other code, package or kind of device than that of the first step could give steps that don't belong together.
    """
    constants = [WEIGHT_DECAY, SEED]
    computing = {"threads": torch.get_num_threads(), "processes": shard().size}
    return {"constants": constants, **describe_environment(str(device)), **computing}
