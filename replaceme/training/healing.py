"""The heal stage: the layers from the first cut on, trained for a while toward what the dense model predicts.

A repair makes each state like the dense model's, layer by layer, and all its directions count alike. What a user reads is the
predictions. The same linears (those that end attention and MLP) go on from there, all of them together, down the mean of

    KL(p ‖ q) = Σ_v p(v) log(p(v) / q(v)),    p = the dense model's distribution of the next token, q = the shortened one's,

over the real tokens of the calibration text (distillation: Hinton et al., arXiv 1503.02531; healing by low-rank adapters and
next tokens: Gromov et al., arXiv 2403.17887). That is training, and everything that tells of the result says so. There is no
new parameter: what was learnt is a change of these weights, as a repair's is.

Nothing in front of the first cut computes anything: what enters its host, and what leaves the dense model's last layer, lies in
scratch files from one pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import kl_div, log_softmax
from torch.utils.checkpoint import checkpoint

from replaceme.base.documents import Batch, Documents
from replaceme.edits.edits import Edits
from replaceme.edits.fold import changed_parameters
from replaceme.edits.unfused import unfused
from replaceme.models.families import Family, Linear, in_torch_layout, parameter_of
from replaceme.models.layers import gradients_for, passed_by
from replaceme.observers.features import LINEARS
from replaceme.observers.walk import Start, begun_at
from replaceme.training.training import Texts

# The part of a step's tokens whose predictions are compared. (A step takes most of its time for them; as many tokens, in twice
# as many steps, learn more.)
SHARE = 0.5
# Rows of logits of which the divergence is taken at once.
ROWS = 128


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the mean over rows of KL(p ‖ q), p and q the softmaxes of logits (rows, words).

    What a backward pass needs is computed again there, a few rows at a time: it would be several times the logits.
    """
    parts = zip(wanted.split(ROWS), found.split(ROWS), strict=True)
    sums = [checkpoint(_divergence, *part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum() / len(found)


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    p, q = log_softmax(wanted.float(), dim=-1), log_softmax(found.float(), dim=-1)
    return kl_div(q, p, reduction="sum", log_target=True)


@dataclass(frozen=True)
class Predictions:
    """What the layers from a cut on are to learn: the dense model's predictions.

    Attributes:
        model: the dense model, which stays as it is.
        family: its description.
        edits: what shortens it.
        documents: the text.
        host: the layer in front of the first that goes.
        entering: (tokens, d) what enters the host, in the order of a walk.
        leaving: (tokens, d) what leaves the dense model's last layer.
    """

    model: Any
    family: Family
    edits: Edits
    documents: Documents
    host: int
    entering: Tensor
    leaving: Tensor

    @cached_property
    def texts(self) -> Texts:
        """The text, as batches."""
        return Texts(self.documents, next(self.model.parameters()).device)

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The dense model's layers."""
        return self.family.decoder_layers(self.model)

    @cached_property
    def changed(self) -> dict[tuple[int, str], Tensor]:
        """What the edits make of each parameter that they touch, by layer and name within it: float32, in torch's layout."""
        changed = changed_parameters(self.family, self.layers, self.edits)
        # At the processor: those that are trained are on the device already.
        return {(layer, name): value.float().cpu() for layer, name, value in changed}

    @cached_property
    def trained(self) -> list[tuple[int, Linear, str]]:
        """The parameters that are trained: layer, linear, and name within the layer."""
        kept = [layer for layer in range(self.host, len(self.layers)) if layer not in set(self.edits.removed_layers)]
        return [
            (layer, linear, name)
            for layer in kept
            for linear in LINEARS
            for name in self.family.ends(self.layers[layer], linear)
        ]

    def learners(self) -> dict[str, Tensor]:
        """Return float32 copies of the parameters to train, by their names in the dense model, in torch's layout."""
        started = {self._name(layer, name): self._start(layer, name) for layer, _, name in self.trained}
        return {name: value.to(self.texts.device, copy=True).requires_grad_() for name, value in started.items()}

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Let the model compute what the edits make of it, for as long as the training takes."""
        learnt = {(layer, name) for layer, _, name in self.trained}
        standing_in = {place: value for place, value in self.changed.items() if place not in learnt}
        folded = Edits(self.edits.title, self.edits.removed_layers, operators=self.edits.operators, parameters=standing_in)
        with gradients_for(self.model), unfused(self.model, self.family, folded):
            yield

    def loss(self, parameters: Mapping[str, Tensor], documents: Sequence[int], step: int | None) -> Tensor:
        """Return the mean divergence over a part of the real tokens of documents; without a step, always over the same part."""
        batch = self.texts.batch(documents)
        longest = batch.input_ids.shape[1]
        chance = torch.Generator().manual_seed(-1 if step is None else step)
        places = torch.randperm(longest, generator=chance)[: max(round(SHARE * longest), 1)].sort().values
        places = places.to(self.texts.device)
        real = batch.mask[:, places]
        with torch.no_grad():
            wanted = self._dense(batch, self.texts.rows(self.leaving, documents), places)[real]
        found = self._shortened(parameters, batch, self.texts.rows(self.entering, documents), places)
        return divergence(wanted, found[real])

    def correct(self, edits: Edits, parameters: Mapping[str, Tensor]) -> None:
        """Add what was learnt to edits."""
        changes = {
            (layer, name): parameters[self._name(layer, name)].detach().cpu() - self._start(layer, name)
            for layer, _, name in self.trained
        }
        for layer, linear, name in self.trained:
            if name.endswith(".weight"):
                edits.correct(layer, linear, changes[layer, name], changes.get((layer, name.replace(".weight", ".bias"))))

    def _name(self, layer: int, name: str) -> str:
        return f"{self.family.layers}.{layer}.{name}"

    def _start(self, layer: int, name: str) -> Tensor:
        """Return a parameter as the edits make it."""
        changed = self.changed.get((layer, name))
        return parameter_of(self.layers[layer], name).float().cpu() if changed is None else changed

    def _shortened(self, parameters: Mapping[str, Tensor], batch: Batch, rows: Tensor, places: Tensor) -> Tensor:
        """Return the shortened model's logits (documents, places, words), with ``rows`` (tokens, d) entering the host."""
        values = {
            self._name(layer, name): in_torch_layout(self.layers[layer], name, parameters[self._name(layer, name)])
            for layer, _, name in self.trained
        }
        values = {name: value.to(self.model.dtype) for name, value in values.items()}
        with begun_at(self.family, self.layers, Start(self.host, rows), lambda: batch):
            return self._logits(batch, places, values)

    def _dense(self, batch: Batch, rows: Tensor, places: Tensor) -> Tensor:
        """Return the dense model's logits, likewise, with ``rows`` leaving its last layer."""

        # Behind everything that the edits do to that layer.
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            padded = batch.padded(rows)
            return padded if isinstance(output, Tensor) else (padded, *output[1:])

        with passed_by(self.family, self.layers):
            handle = self.layers[-1].register_forward_hook(hook)
            try:
                return self._logits(batch, places, {})
            finally:
                handle.remove()

    def _logits(self, batch: Batch, places: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "use_cache": False, "logits_to_keep": places}
        logits: Tensor = functional_call(self.model, dict(values), (), inputs).logits
        return logits
