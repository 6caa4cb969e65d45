"""Healing: the shortened model learns the dense model's predictions (distillation: Hinton et al., arXiv 1503.02531).

A repair fits each state to the dense model's, layer by layer, with equal weight on all directions; a user sees only the
predictions. Healing starts from the repaired weights and minimizes the mean, over all real tokens, of

    KL(p ‖ q) = Σ_v p(v) log(p(v) / q(v)),    p = the dense model's distribution of the next token, q = the shortened one's:

forward, at temperature 1, without labels, as does best in Minitron (arXiv 2407.14679). This is training, and every record of
the result says so. Like a repair, it changes existing weights and adds none.

The student is a copy of the dense model with the edits folded in. It shares with it all weights that stay as they are; those
that are trained are float32. Logits are computed for a few rows at a time, and so is the gradient of the loss with respect to
them, q − p; no more of them is ever in memory.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, softmax

from replaceme.base.accelerators import is_accelerator, to_float64
from replaceme.base.documents import HELD_OUT_EVERY, SOURCE_BITS, Batch, Documents, in_shares, seeded_order
from replaceme.base.group import shard
from replaceme.edits.edits import OUTSIDE, Edits
from replaceme.edits.fold import edited_parameters, set_parameter, shorten
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, decoder_of, in_torch_layout, is_conv1d, parameter_of
from replaceme.models.layers import (
    EntryState,
    enable_gradients,
    input_of,
    replace_output,
    skip_layers,
    start_at_layer,
    tensor_of,
)
from replaceme.statistics.features import LINEARS
from replaceme.training.training import SEED, DocumentBatches, StepPlan

# Rows of logits at once: on a processor, whose caches are small (over a vocabulary of 49k, they take 25 MB); on a GPU, as many
# as have so many bytes in float32, of which there are some seven at the same time.
ROWS, DEVICE_ROWS, DEVICE_BYTES = 128, 2048, 1 << 28
# Tokens of the text that are held out; their loss is evaluated at the beginning, before this step, the doubled one, and so on.
HELD_OUT_TOKENS, FIRST_EVALUATION = 4096, 8
# The rate rises over the first steps, is constant, and falls to zero over the last part (Hägele et al., arXiv 2405.18392). So a
# longer training has the same steps up to that part. AdamW's moments and the gradient norm to clip at: as language models are
# trained.
WARM_UP_STEPS, DECAY, BETAS, CLIP = 3, 0.4, (0.9, 0.95), 1.0


def plan_steps(
    documents: Documents, shares: Sequence[float], tokens: int, tokens_per_step: int, learning_rate: float
) -> StepPlan:
    """Return the steps of a training on a text, in its order, until the tokens are reached.

    Each domain has its share of the tokens throughout. One that ends is read again, in another order.

    Args:
        documents: the text, of which some is held out (``hold_out``).
        shares: of the tokens, by domain, relative to each other.
        tokens: tokens to train on.
        tokens_per_step: tokens of a step, to a document.
        learning_rate: the largest learning rate.
    """
    (train_indices, held_out), lengths = hold_out(documents), [*map(len, documents.documents)]
    steps: list[list[int]] = [[]]
    size, left = 0, tokens
    domains: dict[int, list[int]] = {}
    for index in train_indices:
        domains.setdefault(documents.sources[index] >> SOURCE_BITS, []).append(index)
    streams = {domain: _iterate_epochs(documents, own) for domain, own in domains.items()}
    for _, index, _ in in_shares(streams, shares):
        if left <= 0:
            break
        if size and size + lengths[index] > tokens_per_step:
            steps.append([])
            size = 0
        steps[-1].append(index)
        size, left = size + lengths[index], left - lengths[index]
    count, decay = len(steps), math.ceil(DECAY * len(steps))
    rates = [learning_rate * min((step + 1) / WARM_UP_STEPS, 1, (count - step) / (decay + 1)) for step in range(count)]
    evaluated = {0, count - decay, *(FIRST_EVALUATION << power for power in range(count.bit_length()))}
    return StepPlan(steps, rates, held_out, "heal_learning_rate", BETAS, CLIP, evaluated, count - decay)


def hold_out(documents: Documents) -> tuple[list[int], list[int]]:
    """Return the documents of a text to train on, and those that are held out, by index, in its order.

    A piece of a text tells much about its other pieces, so that documents are held out by whole sources: of each domain, every
    ``HELD_OUT_EVERY``-th source that comes, until ``HELD_OUT_TOKENS`` are held out. What then comes of these sources is left
    out. In a longer text that begins the same, the same documents are held out, and more if these were too few.
    """
    train_indices, held_out, chosen, count = list[int](), list[int](), set[int](), 0
    seen: dict[int, set[int]] = {}
    for index, (source, document) in enumerate(zip(documents.sources, documents.documents, strict=True)):
        others = seen.setdefault(source >> SOURCE_BITS, set())
        if source not in others:
            others.add(source)
            if len(others) % HELD_OUT_EVERY == 0 and count < HELD_OUT_TOKENS:
                chosen.add(source)
        if source not in chosen:
            train_indices.append(index)
        elif count < HELD_OUT_TOKENS:
            held_out.append(index)
            count += len(document)
    return train_indices, held_out


def _iterate_epochs(documents: Documents, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield documents with their indices, in their order, then in seeded orders, without end."""
    yield from ((index, documents.documents[index]) for index in indices)
    epoch = 1
    while True:
        for number in seeded_order(len(indices), SEED + epoch).tolist():
            yield indices[number], documents.documents[indices[number]]
        epoch += 1


def copy_shortened(model: Any, family: Family, edits: Edits, first: int, which: str) -> tuple[Any, list[str]]:
    """Return a copy of a model with the edits folded in; it shares its unchanged parameters with it.

    Args:
        model: the dense model.
        family: its description.
        edits: the changes.
        first, which: as of ``LogitDistillation``.

    Returns:
        The copy, whose trained parameters are float32 (with lora, they stay as they are), and the names of these.
    """
    student = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    layers = shorten(student, family, edits)
    names = list_trained(student, family, which, edits.position(first))
    trained = set() if which == "lora" else {*names}
    edited = set()
    for name, exact in edited_parameters(student, family, layers, edits):
        set_parameter(student, name, exact, torch.float32 if name in trained else None)
        edited.add(name)
    for name in trained - edited:
        # A copy: the dense model keeps its own.
        set_parameter(student, name, parameter_of(student, name).clone(), torch.float32)
    return student, names


def list_trained(student: Any, family: Family, which: str, first: int) -> list[str]:
    """Return the names of the parameters that ``heal_weights`` names.

    Args:
        student: the shortened model.
        family: its description.
        which: all, after_cut, outputs or lora.
        first: the first layer of it whose states differ from the dense model's.
    """
    layers, prefix = family.decoder_layers(student), f"{family.layers}."
    if which == "outputs":
        return [
            f"{prefix}{at}.{name}"
            for at in range(first, len(layers))
            for linear in LINEARS
            for name in family.output_parameters(layers[at], linear)
        ]
    start = 0 if which in ("all", "lora") else first
    inside = [
        f"{prefix}{at}.{name}"
        for at in range(start, len(layers))
        for name, _ in layers[at].named_parameters()
        if not name.startswith("operator.")
    ]
    if which == "lora":
        return [name for name in inside if _is_linear(student, name)]
    norms = {id(value) for value in decoder_of(student).parameters() if value.ndim == 1}
    return [*inside, *(name for name, value in student.named_parameters() if id(value) in norms and prefix not in name)]


def _is_linear(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return name.endswith(".weight") and (isinstance(owner, nn.Linear) or is_conv1d(owner))


@dataclass(frozen=True)
class LogitDistillation:
    """Training task of healing: a shortened model learns the dense model's predictions.

    Attributes:
        context: the dense model, which stays unchanged, the text, and the documents in a forward pass.
        edits: the edits that shorten it.
        first: the first layer of the dense model whose states differ.
        which: the trained weights: all, after_cut, outputs or lora.
        rank: of the low-rank changes of lora.
    """

    context: ModelContext
    edits: Edits
    first: int
    which: str = "all"
    rank: int = 16

    @property
    def documents(self) -> Documents:
        """The text, in the order of training."""
        return self.context.documents

    @cached_property
    def batches(self) -> DocumentBatches:
        """The text, as batches."""
        return DocumentBatches(self.documents, next(self.context.model.parameters()).device)

    @cached_property
    def _copy(self) -> tuple[Any, list[str]]:
        return copy_shortened(self.context.model, self.context.family, self.edits, self.first, self.which)

    @property
    def student(self) -> Any:
        """The shortened model; with lora, its weights don't change."""
        return self._copy[0]

    @property
    def names(self) -> list[str]:
        """The trained parameters' names in the shortened model."""
        return self._copy[1]

    @property
    def matrices(self) -> list[str]:
        """The names of those that are the matrices of linears; stacks of experts, norms and the factors of lora are not."""
        return [] if self.which == "lora" else [name for name in self.names if _is_linear(self.student, name)]

    @cached_property
    def skipped(self) -> int:
        """How many first layers of both models compute the same, so that the student skips them."""
        return 0 if self.which in ("all", "lora") else self.first

    def trainable_parameters(self) -> dict[str, Tensor]:
        """Return what is trained, float32: parameters of the student by name; with lora, ``NAME.a`` (r, inputs), ``NAME.b``."""
        if self.which != "lora":
            return {name: self.student.get_parameter(name) for name in self.names}
        factors = {}
        random = torch.Generator().manual_seed(SEED)
        for name in self.names:
            rows, columns = parameter_of(self.student, name).shape
            start = torch.randn(self.rank, columns, generator=random) / math.sqrt(columns)
            for part, value in ((".a", start), (".b", torch.zeros(rows, self.rank))):
                factors[name + part] = value.to(self.batches.device).requires_grad_()
        return factors

    @contextmanager
    def training_context(self) -> Iterator[None]:
        """Enable the student's gradients inside the block; the dense model has none."""
        parameters = [] if self.which == "lora" else [self.student.get_parameter(name) for name in self.names]
        with enable_gradients(self.context.model), enable_gradients(self.student, parameters):
            yield

    def loss(self, parameters: Mapping[str, Tensor], documents: Sequence[int]) -> float:
        """Return this process's part of the mean divergence over documents; add its gradients where they are enabled."""
        # Smaller batches where processes would get none of a step.
        size = min(self.context.batch_size, max(-(-len(documents) // shard().size), 1))
        count = self.batches.token_count(documents)
        parts = [documents[start : start + size] for start in range(0, len(documents), size)]
        with self._adapters(parameters):
            loss = sum(self._loss_of_batch(part, count) for number, part in enumerate(parts) if shard().owns(number))
        for parameter in parameters.values():
            # A process without a batch of this step adds nothing to it.
            if parameter.grad is None and torch.is_grad_enabled():
                parameter.grad = torch.zeros_like(parameter)
        return loss

    def _loss_of_batch(self, documents: Sequence[int], count: int) -> float:
        """Return the sum of the divergences over a batch's tokens, divided by ``count``; add its gradients."""
        batch = self.batches.batch(documents)
        with torch.no_grad():
            teacher_states = self._run(self.context.model, batch)
        with self._product_format():
            student_states = self._run(self.student, batch)
        rows, sums = student_states.detach().requires_grad_(student_states.requires_grad), []
        model, family = self.context.model, self.context.family
        size = _rows_at_once(rows.device, int(model.config.vocab_size))
        with _head_alone(model, family) as dense_head, _head_alone(self.student, family) as head:
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                with torch.no_grad():
                    teacher = dense_head(teacher_states[part]).float()
                with self._product_format():
                    logits = head(rows[part])
                with torch.no_grad():
                    p, q = softmax(teacher, dim=-1), softmax(logits.float(), dim=-1)
                    logs = log_softmax(teacher, dim=-1).sub_(log_softmax(logits.float(), dim=-1))
                    sums.append(torch.linalg.vecdot(p, logs).sum())
                    gradient = q.sub_(p).div_(count)
                if logits.requires_grad:
                    logits.backward(gradient.to(logits.dtype))
        if rows.grad is not None:
            student_states.backward(rows.grad)
        return float(to_float64(torch.stack(sums)).sum()) / count

    def _run(self, model: Any, batch: Batch) -> Tensor:
        """Return the states of the real tokens, (tokens, d), that leave a model's last layer.

        Where the student computes the same up to ``first``, it starts there with what entered that layer of the dense model.
        """
        family, layers, seen = self.context.family, self.context.family.decoder_layers(model), list[Tensor]()
        student = model is self.student

        def record_exit(_module: nn.Module, _args: Any, output: Any) -> None:
            seen.append(batch.real(tensor_of(output)))

        def record_entry(_module: nn.Module, args: Any, kwargs: Any) -> None:
            batch.scratch["carried"] = input_of(args, kwargs)

        with ExitStack() as stack:
            if student and self.skipped:
                entry = EntryState(self.edits.position(self.skipped), None)
                stack.enter_context(start_at_layer(family, layers, entry, lambda: batch))
            stack.callback(layers[-1].register_forward_hook(record_exit).remove)
            if not student and self.skipped:
                stack.callback(layers[self.first].register_forward_pre_hook(record_entry, with_kwargs=True).remove)
            decoder_of(model)(input_ids=batch.input_ids, use_cache=False)
        return seen[-1]

    def _product_format(self) -> AbstractContextManager[Any]:
        """Return the context in which the student's products have the dense model's dtype; stacked experts' stay float32."""
        dtype = self.context.model.dtype
        return torch.autocast(self.batches.device.type, dtype, enabled=dtype != torch.float32)

    @contextmanager
    def _adapters(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Add the low-rank changes of lora, ``x Aᵀ Bᵀ``, inside the block."""
        with ExitStack() as stack:
            for name in self.names if self.which == "lora" else ():
                module = self.student.get_submodule(name.rpartition(".")[0])
                hook = _make_low_rank_hook(parameters[f"{name}.a"], parameters[f"{name}.b"])
                stack.callback(module.register_forward_hook(hook).remove)
            yield

    def healed_edits(self, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> Edits:
        """Return edits that give the trained model: the value of each parameter that differs from the dense model's.

        Args:
            parameters: the trained ones.
            dtype: of the model's files.
        """
        edits, family = self.edits, self.context.family
        kept = [layer for layer in range(len(self.context.layers)) if layer not in set(edits.removed_layers)]
        trained, edited = {*self.names}, edited_parameters(self.context.model, family, self.context.layers, edits)
        values = {name: exact.to("cpu", dtype) for name, exact in edited if name not in trained}
        for name in self.names:
            value = in_torch_layout(self.student, name, self.student.get_parameter(name).detach())
            if self.which == "lora":
                value = to_float64(value) + to_float64((parameters[f"{name}.b"] @ parameters[f"{name}.a"]).detach())
            values[name] = value
        healed = Edits(edits.title, edits.removed_layers, config=edits.config, parts=edits.parts)
        healed.operators = {layer: P for layer, P in edits.operators.items() if P.ndim}
        prefix = f"{family.layers}."
        for name, value in values.items():
            at, _, own = name.removeprefix(prefix).partition(".")
            key = (kept[int(at)], own) if name.startswith(prefix) else (OUTSIDE, name)
            if not key[1].startswith("operator."):
                # A copy: of a view, the whole tensor would be stored.
                healed.parameters[key] = value.to("cpu", dtype, copy=True).contiguous()
        return healed


def _rows_at_once(device: torch.device, words: int) -> int:
    """Return how many rows of logits over so many words are computed at once."""
    return min(max(DEVICE_BYTES // (4 * words), 1), DEVICE_ROWS) if is_accelerator(device) else ROWS


@contextmanager
def _head_alone(model: Any, family: Family) -> Iterator[Any]:
    """Return a function from the states that leave a model's last layer, (rows, d), to its logits (rows, words)."""
    layers, given = family.decoder_layers(model), list[Tensor]()

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return replace_output(output, given[-1][:, None])

    def compute_logits(rows: Tensor) -> Tensor:
        given[:] = [rows]
        # Each row is a text of one token, which has a position in every model.
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, 0]
        return logits

    with skip_layers(family, layers), ExitStack() as stack:
        stack.callback(layers[-1].register_forward_hook(hook).remove)
        yield compute_logits


def _make_low_rank_hook(a: Tensor, b: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + (args[0].to(a.dtype) @ a.T @ b.T).to(output.dtype)

    return hook
