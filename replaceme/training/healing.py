"""Healing: train the layers from the first cut on toward the dense model's predictions.

A repair fits each state to the dense model's, layer by layer, with equal weight on all directions; a user sees only the
predictions. Healing starts from the repaired weights and trains the same linears (the last ones of attention and MLP) jointly.
It minimizes the mean of

    KL(p ‖ q) = Σ_v p(v) log(p(v) / q(v)),    p = the dense model's distribution of the next token, q = the shortened one's,

over the real tokens of the calibration text (distillation: Hinton et al., arXiv 1503.02531; healing by low-rank adapters and
next tokens: Gromov et al., arXiv 2403.17887). This is training, and every record of the result says so. It adds no parameter:
like a repair, it changes existing weights.

The layers before the first one that changes don't run: the states that enter it and those that leave the dense model's last
layer are read from scratch files, which one pass writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from replaceme.base.documents import Batch, Documents, seeded_order
from replaceme.base.group import shard
from replaceme.edits.edits import Edits
from replaceme.edits.fold import changed_parameters
from replaceme.edits.unfused import unfused
from replaceme.models.context import ModelContext
from replaceme.models.families import Linear, in_torch_layout, parameter_of
from replaceme.models.layers import (
    EntryState,
    enable_gradients,
    replace_output,
    replacing_parameter,
    skip_layers,
    start_at_layer,
)
from replaceme.statistics.features import LINEARS
from replaceme.training.training import DocumentBatches

# Fraction of a step's positions whose predictions are compared. (Predictions take most of a step's time. The same number of
# positions spread over twice as many steps gave a lower loss.)
SHARE = 0.5
# Rows of logits whose divergence is computed at once.
ROWS = 128


def kl_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return the sum over rows of KL(p ‖ q) in nats, where p and q are the softmaxes of logits (rows, words).

    The backward pass recomputes its intermediate values, ``ROWS`` rows at a time; stored, they would take several times the
    memory of the logits.
    """
    parts = zip(teacher_logits.split(ROWS), student_logits.split(ROWS), strict=True)
    sums = [checkpoint(_kl_divergence_of_rows, *part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum()


def _kl_divergence_of_rows(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    teacher, student = (log_softmax(logits.float(), dim=-1) for logits in (teacher_logits, student_logits))
    return kl_div(student, teacher, reduction="sum", log_target=True)


@dataclass(frozen=True)
class LogitDistillation:
    """Training task of healing: the layers from the cut on learn the dense model's predictions.

    Attributes:
        context: the dense model, which stays unchanged, and its calibration text.
        edits: the edits that shorten it.
        first: the first layer whose states differ: the one before the first removed layer, or with narrower MLPs the first one.
        entering: (tokens, d) states that enter that layer, in the order of a walk.
        leaving: (tokens, d) states that leave the dense model's last layer, in the same order.
    """

    context: ModelContext
    edits: Edits
    first: int
    entering: Tensor
    leaving: Tensor

    @property
    def documents(self) -> Documents:
        """The calibration text."""
        return self.context.documents

    @cached_property
    def batches(self) -> DocumentBatches:
        """The text, as batches."""
        return DocumentBatches(self.documents, next(self.context.model.parameters()).device)

    @cached_property
    def changed(self) -> dict[tuple[int, str], Tensor]:
        """The edited value of each parameter that the edits change, by layer and name within it: float32, in torch's layout."""
        changed = changed_parameters(self.context.family, self.context.layers, self.edits)
        # On the CPU: the trained parameters have their own copies on the device.
        return {(layer, name): value.float().cpu() for layer, name, value in changed}

    @cached_property
    def trained(self) -> dict[str, tuple[int, Linear, str]]:
        """The trained parameters: name in the dense model → layer, linear, and name within the layer."""
        family, layers = self.context.family, self.context.layers
        return {
            f"{family.layers}.{layer}.{name}": (layer, linear, name)
            for layer in range(self.first, len(layers))
            if layer not in self.edits.removed_layers
            for linear in LINEARS
            for name in family.output_parameters(layers[layer], linear)
        }

    def trainable_parameters(self) -> dict[str, Tensor]:
        """Return float32 copies of the trained parameters on the device, by name in the dense model, in torch's layout."""
        initial = {name: self._initial_value(name) for name in self.trained}
        return {name: value.to(self.batches.device, copy=True).requires_grad_() for name, value in initial.items()}

    @contextmanager
    def training_context(self) -> Iterator[None]:
        """Apply the edits to the model's computation inside the block; the trained parameters come with each pass."""
        model, trained = self.context.model, {(layer, name) for layer, _, name in self.trained.values()}
        rest = Edits(self.edits.title, self.edits.removed_layers, operators=self.edits.operators)
        with ExitStack() as stack:
            stack.enter_context(enable_gradients(model))
            for (layer, name), value in self.changed.items():
                if (layer, name) not in trained:
                    stack.enter_context(replacing_parameter(self.context.layers[layer], name, value))
            stack.enter_context(unfused(model, self.context.family, rest))
            yield

    def loss(self, parameters: Mapping[str, Tensor], documents: Sequence[int], step: int | None) -> Tensor:
        """Return the mean divergence over a random part of the documents' real tokens: chosen by step, or the same for None.

        Of processes that share the training, each computes a part of the documents.
        """
        lengths = self.batches.lengths[[*documents]]
        order = seeded_order(int(lengths.max()), -1 if step is None else step)
        positions = order[: max(round(SHARE * len(order)), 1)].sort().values
        count = int((positions < lengths[:, None]).sum())
        own = [document for number, document in enumerate(documents) if shard().owns(number)]
        if not own:
            return torch.stack([0 * parameter.sum() for parameter in parameters.values()]).sum()
        batch = self.batches.batch(own)
        positions = positions[positions < batch.input_ids.shape[1]].to(self.batches.device)
        real = batch.mask[:, positions]
        with torch.no_grad():
            teacher_logits = self._dense(batch, self.batches.rows(self.leaving, own), positions)[real]
        student_logits = self._shortened(parameters, batch, self.batches.rows(self.entering, own), positions)
        return kl_divergence(teacher_logits, student_logits[real]) / count

    def add_corrections(self, edits: Edits, parameters: Mapping[str, Tensor]) -> None:
        """Add the learnt changes to the edits."""
        changes = {name: parameters[name].detach().cpu() - self._initial_value(name) for name in self.trained}
        for name, (layer, linear, _) in self.trained.items():
            if name.endswith(".weight"):
                edits.correct(layer, linear, changes[name], changes.get(name.replace(".weight", ".bias")))

    def _initial_value(self, name: str) -> Tensor:
        """Return a trained parameter's value before training: the edited one."""
        layer, _, own = self.trained[name]
        changed = self.changed.get((layer, own))
        return parameter_of(self.context.layers[layer], own).float().cpu() if changed is None else changed

    def _shortened(self, parameters: Mapping[str, Tensor], batch: Batch, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the shortened model's logits (documents, positions, words) for ``rows`` (tokens, d) that enter ``first``."""
        layers = self.context.layers
        values = {
            name: in_torch_layout(layers[layer], own, parameters[name]).to(self.context.model.dtype)
            for name, (layer, _, own) in self.trained.items()
        }
        with start_at_layer(self.context.family, layers, EntryState(self.first, rows), lambda: batch):
            return self._logits(batch, positions, values)

    def _dense(self, batch: Batch, rows: Tensor, positions: Tensor) -> Tensor:
        """Return the dense model's logits (documents, positions, words), with ``rows`` (tokens, d) leaving its last layer."""

        # This hook runs after all hooks of the edits on that layer.
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            return replace_output(output, batch.padded(rows))

        with skip_layers(self.context.family, self.context.layers):
            handle = self.context.layers[-1].register_forward_hook(hook)
            try:
                return self._logits(batch, positions, {})
            finally:
                handle.remove()

    def _logits(self, batch: Batch, positions: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "use_cache": False, "logits_to_keep": positions}
        logits: Tensor = functional_call(self.context.model, dict(values), (), inputs).logits
        return logits
