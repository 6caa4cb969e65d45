"""Train one decoder layer to make given states of given states, by itself: no other layer computes or needs a gradient.

The loss of a step is the mean, over the real tokens of a few documents and the d entries of each, of ``(layer(x) − y)²``: the
squared error, on whole documents, so that the attention sees what it sees in the model. AdamW with a linear warm-up and a
cosine decay (LLM-Streamline, arXiv 2403.19135, and its public program). Weights, moments and gradients are float32, whatever
the model's format is; dropout is off.

A run that is interrupted goes on from its last checkpoint, to the same result as one that was not: the order of the documents
is a function of the epoch's number, and a checkpoint holds the rest.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as trees

from replaceme.checkpoints import load_checkpoint, save_checkpoint
from replaceme.curves import CURVES, add_row, write_curves
from replaceme.documents import Batch, Documents
from replaceme.errors import SolveError
from replaceme.families import Family, decoder_of
from replaceme.forward import tensor_of
from replaceme.progress import logger, progress
from replaceme.unfused import passed_by, silent

# Rows (steps that were made before, loss), by a curve's name.
Curves = dict[str, list[tuple[int, float]]]

# The published values: of AdamW, the largest norm of the gradient, the part of the steps that warms up, and where the step's
# size ends, as a part of it.
WEIGHT_DECAY, CLIP, WARM_UP, FLOOR = 1e-3, 5.0, 0.01, 0.25
# Of the order of documents.
SEED = 0
# Every this many documents one is held out, whose loss is taken so often.
HELD_OUT_EVERY, EVALUATIONS = 20, 8
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Course:
    """How long and how fast.

    Attributes:
        learning_rate: the largest step.
        epochs: passes over the documents.
        batch_size: documents of a step.
    """

    learning_rate: float
    epochs: int
    batch_size: int

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step (from 0) of so many."""
        warm = max(WARM_UP * steps, 1.0)
        if step + 1 < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step + 1 - warm) / max(steps - warm, 1.0)
        return self.learning_rate * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


@dataclass(frozen=True)
class Lesson:
    """What a layer is to learn.

    Attributes:
        model: the dense model.
        family: its description.
        layer: the layer's position.
        documents: the text.
        inputs: (tokens, d) what enters the layer, in the order of a walk.
        targets: (tokens, d) what is to leave it.
        silent: the path of an attention that it is to do without; None leaves it its own.
    """

    model: Any
    family: Family
    layer: int
    documents: Documents
    inputs: Tensor
    targets: Tensor
    silent: str | None = None

    @property
    def module(self) -> nn.Module:
        """The layer itself, which stays as it is."""
        return self.family.decoder_layers(self.model)[self.layer]

    def learners(self, left_out: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return float32 copies of the layer's parameters to train, by name, but for those below some paths."""
        return {
            name: parameter.detach().float().clone().requires_grad_()
            for name, parameter in self.module.named_parameters()
            if not name.startswith(tuple(f"{path}." for path in left_out))
        }


def split(count: int) -> tuple[list[int], list[int]]:
    """Return which documents of a walk are trained on, and which are held out."""
    held_out = [index for index in range(count) if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
    return [index for index in range(count) if index not in set(held_out)], held_out


def orders(documents: Sequence[int], epoch: int, batch_size: int) -> list[list[int]]:
    """Return an epoch's batches of documents."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
    shuffled = [documents[index] for index in order]
    return [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]


class Bound:
    """A layer's loss on batches of documents, as a function of its parameters."""

    def __init__(self, lesson: Lesson):
        self.lesson = lesson
        self.texts = lesson.documents.longest_first()
        lengths = torch.tensor([len(text) for text in self.texts])
        self.starts = (lengths.cumsum(0) - lengths).tolist()
        self.device = next(lesson.module.parameters()).device
        self.buffers = {name: _float32(buffer, self.device) for name, buffer in lesson.module.named_buffers()}

    def loss(self, parameters: Mapping[str, Tensor], documents: Sequence[int]) -> Tensor:
        """Return the mean squared error, over the real tokens of documents, with these parameters."""
        batch = self._batch(documents)
        found = batch.real(self.states(parameters, batch, self._rows(self.lesson.inputs, documents)))
        return (found - self._rows(self.lesson.targets, documents)).square().mean()

    def states(self, parameters: Mapping[str, Tensor], batch: Batch, rows: Tensor) -> Tensor:
        """Return what leaves the layer (documents, longest, d), with ``rows`` (tokens, d) entering it."""
        args, kwargs = arguments(self.lesson, batch)
        args, kwargs = trees.tree_map(lambda given: _float32(given, self.device), (args, kwargs))
        entering = batch.padded(rows)
        args, kwargs = ((entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entering})
        return tensor_of(functional_call(self.lesson.module, {**parameters, **self.buffers}, args, kwargs))

    def mean_loss(self, parameters: Mapping[str, Tensor], documents: Sequence[int], batch_size: int) -> float:
        """Return the mean squared error over all tokens of documents."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(documents), batch_size):
                chosen = documents[start : start + batch_size]
                count = sum(len(self.texts[index]) for index in chosen)
                total, tokens = total + count * float(self.loss(parameters, chosen)), tokens + count
        return total / tokens

    def _batch(self, documents: Sequence[int]) -> Batch:
        texts = [self.texts[index].long() for index in documents]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return Batch(0, ids.to(self.device), torch.tensor([len(text) for text in texts], device=self.device), 0)

    def _rows(self, states: Tensor, documents: Sequence[int]) -> Tensor:
        parts = [states[self.starts[index] : self.starts[index] + len(self.texts[index])] for index in documents]
        return torch.cat(parts).to(self.device).float()


class _ReachedError(Exception):
    """Ends a forward pass in front of the layer."""


@torch.no_grad()
def arguments(lesson: Lesson, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the model calls the layer with on a batch; the layers before it compute nothing."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append((args, kwargs))
        raise _ReachedError

    layers = lesson.family.decoder_layers(lesson.model)
    handle = lesson.module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with passed_by(lesson.family, layers[: lesson.layer]):
            first = next(lesson.model.parameters()).device
            decoder_of(lesson.model)(input_ids=batch.input_ids.to(first), use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return given[0]


def _float32(given: Any, device: torch.device) -> Any:
    if not isinstance(given, Tensor):
        return given
    return given.to(device, torch.float32 if given.is_floating_point() else given.dtype)


def train(
    lesson: Lesson, parameters: dict[str, Tensor], course: Course, folder: Path, key: str
) -> tuple[dict[str, Tensor], Curves]:
    """Train a layer.

    Args:
        lesson: what it is to learn.
        parameters: to begin with, float32 with gradients; they are changed. The layer's other ones stay its own.
        course: how long and how fast.
        folder: where checkpoints lie, and the curves while it runs.
        key: what a checkpoint must have been made with (``replaceme.checkpoints``).

    Returns:
        The parameters, and the curves.

    Raises:
        SolveError: the loss is no number any more.
    """
    run = _Run(lesson, parameters, course, folder, key)
    with run.bare():
        for step in progress(
            range(run.step, run.steps), "training", "steps", note=lambda: f"loss {run.curves['loss'][-1][1]:.4g}"
        ):
            run.take(step)
        run.evaluate(run.steps)
    return run.parameters, run.curves


class _Run:
    """A training under way."""

    def __init__(self, lesson: Lesson, parameters: dict[str, Tensor], course: Course, folder: Path, key: str):
        self.lesson, self.parameters, self.course, self.folder, self.key = lesson, parameters, course, folder, key
        self.bound = Bound(lesson)
        self.taught, self.held_out = split(len(lesson.documents))
        # Those that are not trained are float32 too.
        self.fixed = {
            name: parameter.detach().float() for name, parameter in lesson.module.named_parameters() if name not in parameters
        }
        self.optimizer = torch.optim.AdamW(parameters.values(), lr=course.learning_rate, weight_decay=WEIGHT_DECAY)
        self.per_epoch = -(-len(self.taught) // course.batch_size)
        self.steps = self.per_epoch * course.epochs
        self.step = 0
        self.curves: Curves = {name: [] for name in CURVES}
        self._go_on()
        folder.mkdir(parents=True, exist_ok=True)
        write_curves(folder, self.curves)
        self.saved = time.monotonic()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Let the layer do without what it is to do without."""
        context: AbstractContextManager[None] = nullcontext()
        if self.lesson.silent:
            context = silent(self.lesson.module.get_submodule(self.lesson.silent))
        with context:
            yield

    @property
    def whole(self) -> dict[str, Tensor]:
        return {**self.fixed, **self.parameters}

    def take(self, step: int) -> None:
        """Make a step."""
        self.evaluate(step)
        epoch, place = divmod(step, self.per_epoch)
        documents = orders(self.taught, epoch, self.course.batch_size)[place]
        loss = self.bound.loss(self.whole, documents)
        self.log("loss", step, float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.course.rate(step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = step + 1
        if time.monotonic() - self.saved >= CHECKPOINT_SECONDS:
            self.save()

    def evaluate(self, step: int) -> None:
        """Take the loss of what is held out, at a few steps, and at the first and behind the last one."""
        if self.held_out and (step == self.steps or step % max(self.steps // EVALUATIONS, 1) == 0):
            self.log("held_out_loss", step, self.bound.mean_loss(self.whole, self.held_out, self.course.batch_size))

    def log(self, name: str, step: int, value: float) -> None:
        """Add to a curve."""
        if not math.isfinite(value):
            raise SolveError(
                f"llm_streamline_learning_rate: the loss of the training is {value} at step {step}; take a lower one."
            )
        self.curves[name].append((step, value))
        add_row(self.folder, name, step, value)

    def save(self) -> None:
        """Write a checkpoint."""
        tensors = {f"weight.{name}": parameter for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{part}.{name}": value for part, value in self.optimizer.state[parameter].items()}
        save_checkpoint(self.folder / "checkpoint", self.key, {"step": self.step, "curves": self.curves}, tensors)
        self.saved = time.monotonic()

    def _go_on(self) -> None:
        found = load_checkpoint(self.folder / "checkpoint", self.key)
        if found is None:
            return
        state, tensors = found
        self.step, self.curves = state["step"], {name: [*map(tuple, rows)] for name, rows in state["curves"].items()}
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight.{name}"])
            self.optimizer.state[parameter] = {
                # Its own count of steps stays at the processor.
                part: tensors[f"{part}.{name}"].to("cpu" if part == "step" else parameter.device)
                for part in ("step", "exp_avg", "exp_avg_sq")
            }
        logger.info("training: goes on behind step %d of %d of an interrupted run", self.step, self.steps)


def settings_of(course: Course) -> dict[str, Any]:
    """Return what a training depends on beside the lesson and the parameters, for a checkpoint's key."""
    constants = [WEIGHT_DECAY, CLIP, WARM_UP, FLOOR, SEED, HELD_OUT_EVERY, EVALUATIONS]
    return {**asdict(course), "constants": constants, "torch": torch.__version__, "threads": torch.get_num_threads()}
