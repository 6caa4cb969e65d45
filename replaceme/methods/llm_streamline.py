"""LLM-Streamline (arXiv 2403.19135): train one lightweight layer in the place of a window of layers.

The window ``[b, b + n]`` is the one whose entering state h_{b−1} and leaving state h_{b+n} have the highest mean cosine ("layer
pruning"). Its first layer stays and is trained to map h_{b−1} to h_{b+n} ("layer replacement"); the n layers after it go. So
the removed block is ``[b + 1, b + n]``, and the trained layer the one before the cut; b may be 0, where the embedding enters.
The loss is the mean of ``(layer(x) − y)²`` over the real tokens of a few documents and the d entries of each. Documents are
whole, so that the attention sees the same context as in the model. No other layer computes or needs a gradient.

The replacement is the whole decoder layer, or only its MLP and the norm before it (``llm_streamline_form``). No class of
transformers has layers without an attention; with ``plain``, the attention stays and adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from replaceme.base.combinations import Settings, Use
from replaceme.base.errors import ParameterError
from replaceme.edits.model_edit import ModelEdit
from replaceme.methods.method import Method, MethodContext, leave_empty
from replaceme.selection.criteria import WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from replaceme.base.documents import Batch, Documents
    from replaceme.base.parameters import Params
    from replaceme.models.context import ModelContext
    from replaceme.models.families import Family
    from replaceme.models.model import Model
    from replaceme.training.training import DocumentBatches, StepPlan

TITLES = {"layer": "LLM-Streamline (a trained layer)", "mlp": "LLM-Streamline (a trained MLP)"}
# Of the public code: AdamW's moments, the gradient norm to clip at, the fraction of the steps that warm up, and the final
# learning rate as a fraction of the largest.
BETAS, CLIP, WARM_UP, FLOOR = (0.9, 0.999), 5.0, 0.01, 0.25
# About one document in so many is held out, by whole texts; their loss is evaluated about this often in a training.
HELD_OUT_EVERY, EVALUATIONS = 20, 8


class Training(Settings):
    """Parameters of the trained layer."""

    llm_streamline_form: Annotated[Literal["layer", "mlp"], Use(("repair",))] = "layer"
    """What is trained in the block's place: the whole layer before it, or only the MLP of that layer, without an attention."""
    llm_streamline_learning_rate: Annotated[float, Use(("repair",))] = Field(2e-4, gt=0)
    """AdamW's peak learning rate."""
    llm_streamline_epochs: Annotated[int, Use(("repair",))] = Field(1, ge=1)
    """Passes over the documents, batch_size documents per step."""


@dataclass(frozen=True)
class TrainedLayer(ModelEdit):
    """One layer with trained weights, and perhaps without its attention: ``h + MLP(norm(h))``.

    Attributes:
        layer: the layer; the removed ones come after it.
        parameters: name within the layer → the parameter's new value, in torch's layout.
        without: paths within the layer of the removed attention and of the removed norm before it; empty where they stay.
    """

    kind = "trained_layer"
    layer: int
    parameters: dict[str, Tensor]
    without: tuple[str, ...] = ()

    @contextmanager
    def unfused(self, model: nn.Module, family: Family) -> Iterator[None]:
        """Replace the layer's parameters, and let a removed attention add 0."""
        from replaceme.models.layers import replacing_parameter, silence_attention

        layer = family.decoder_layers(model)[self.layer]
        with ExitStack() as stack:
            for name, value in self.parameters.items():
                stack.enter_context(replacing_parameter(layer, name, value))
            if self.without:
                stack.enter_context(silence_attention(layer.get_submodule(self.without[0])))
            yield

    def edited_parameters(self, model: nn.Module, family: Family, layers: nn.ModuleList) -> Iterator[tuple[int, str, Tensor]]:
        """Yield the trained parameters (``ModelEdit``)."""
        return ((self.layer, name, value.double()) for name, value in self.parameters.items())

    def own_form(self, layers: str, position: Callable[[int], int]) -> dict[str, Any]:
        """Return the removed parts of the layer."""
        return {"without_attention": {str(position(self.layer)): [*self.without]}} if self.without else {}

    def tensors(self) -> dict[str, Tensor]:
        """Return ``parameter.<layer>.<name>``."""
        return {f"parameter.{self.layer}.{name}": value for name, value in self.parameters.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the layer and its removed parts."""
        return {"layer": self.layer, "without": [*self.without]}

    @classmethod
    def from_stored(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Read what ``to_json`` and ``tensors`` returned."""
        prefix = f"parameter.{content['layer']}."
        parameters = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        return cls(content["layer"], parameters, tuple(content["without"]))

    def sentences(self) -> list[str]:
        """Return what was trained, and what became of the attention."""
        lines = [f"The attention of layer {self.layer} was removed."] if self.without else []
        if self.parameters:
            active = all(bool(value.any()) for value in self.parameters.values())
            rest = "" if active else "; its attention output projection is 0, so that it adds nothing"
            lines = [f"The weights of layer {self.layer} were trained on calibration text{rest}.", *lines]
        return lines


def train_layer(context: MethodContext) -> dict[str, Any]:
    """Train the layer before the cut, add its weights to the edits, and return figures of the training."""
    from replaceme.base.checkpoints import checkpoint_key
    from replaceme.models.devices import require_resident
    from replaceme.training.training import checkpoint_settings, train, write_curves

    own, params, family = Training.of(context.params), context.params, context.family
    (block,) = context.plan.blocks
    index = block.layer_before_cut
    layer = context.layers[index]
    require_resident({index: layer}, "which is to be trained")
    without = (family.attention, family.attention_norm) if own.llm_streamline_form == "mlp" else ()
    schedule = LearningRateSchedule(
        own.llm_streamline_learning_rate, own.llm_streamline_epochs, params.batch_size, "llm_streamline_learning_rate"
    )
    inputs, targets = record_entry_and_exit(context, index, block.end - 1)
    plan = schedule.plan(context.documents.in_walk_order().sources)
    distillation = LayerDistillation(context, index, inputs, targets, without)
    settings = {
        **checkpoint_settings(next(layer.parameters()).device),
        "config": context.model.config.to_json_string(),
        "layer": index,
        "form": own.llm_streamline_form,
        "documents": [len(document) for document in context.documents.documents],
    }
    key = checkpoint_key(settings, [*context.documents.documents, inputs, targets, *layer.parameters()])
    trained = distillation.trainable_parameters()
    curves, figures = train(distillation, trained, plan, context.checkpoints, key)
    write_curves(context.output, curves)
    context.edits.title = TITLES[own.llm_streamline_form]
    context.edits.model_edit = trained_edit(family, layer, index, trained, without, plain=params.plain)
    return figures


@dataclass(frozen=True)
class LearningRateSchedule:
    """Length and learning rate of a training in epochs: a linear warm-up and a cosine decay.

    Attributes:
        learning_rate: the largest learning rate.
        epochs: passes over the documents.
        batch_size: documents per step.
        rate_name: name of the parameter that sets the learning rate, for messages.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    rate_name: str

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step (from 0) out of ``steps``."""
        warm = max(WARM_UP * steps, 1.0)
        if step + 1 < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step + 1 - warm) / max(steps - warm, 1.0)
        return self.learning_rate * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)

    def plan(self, sources: Sequence[int]) -> StepPlan:
        """Return the steps on documents with these sources, in the order of a walk; the order depends only on the epoch."""
        from replaceme.base.documents import split_indices
        from replaceme.training.training import StepPlan

        train_indices, held_out = split_indices(sources, HELD_OUT_EVERY)
        epochs = (shuffled_batches(train_indices, epoch, self.batch_size) for epoch in range(self.epochs))
        documents = [*chain(*epochs)]
        rates = [self.rate(step, len(documents)) for step in range(len(documents))]
        evaluated = range(0, len(documents), max(len(documents) // EVALUATIONS, 1))
        return StepPlan(documents, rates, held_out, self.rate_name, BETAS, CLIP, evaluated)


def shuffled_batches(documents: Sequence[int], epoch: int, batch_size: int) -> list[list[int]]:
    """Return an epoch's batches of documents, in random order."""
    from replaceme.base.documents import seeded_order
    from replaceme.training.training import SEED

    shuffled = [documents[index] for index in seeded_order(len(documents), SEED + epoch).tolist()]
    return [shuffled[start : start + batch_size] for start in range(0, len(shuffled), batch_size)]


def record_entry_and_exit(context: ModelContext, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return the states that enter one layer and those that leave another, in scratch files.

    Args:
        context: the dense model and its calibration text.
        first: the layer whose input states are recorded.
        last: the layer whose output states are recorded.

    Returns:
        Both (tokens, d), in the model's dtype and the order of a walk.
    """
    from replaceme.base.scratch import scratch
    from replaceme.statistics.walk import RecordStates, walk

    shape = context.documents.token_count, context.width
    entering, leaving = scratch([shape] * 2, context.model.dtype, context.folder, "training")
    ends = [RecordStates(first, ("input",), entering), RecordStates(last, ("output",), leaving)]
    walk(context, ends, description="recording the states to train on")
    return entering, leaving


def trained_edit(
    family: Family, layer: nn.Module, index: int, trained: Mapping[str, Tensor], without: tuple[str, ...], *, plain: bool
) -> TrainedLayer:
    """Return the edit of a trained layer; with ``plain``, an attention to be left out stays and adds 0."""
    import torch

    from replaceme.models.families import in_torch_layout, parameter_of

    parameters = {name: in_torch_layout(layer, name, value.detach().cpu()) for name, value in trained.items()}
    if without and plain:
        for name in family.output_parameters(layer, "attention_output"):
            parameters[name] = torch.zeros_like(parameter_of(layer, name), dtype=torch.float32, device="cpu")
    return TrainedLayer(index, parameters, () if plain else without)


@dataclass(frozen=True)
class LayerDistillation:
    """The training data and the loss of a layer: stored states in, stored states out.

    Attributes:
        context: the dense model and its calibration text.
        layer: the layer's position.
        inputs: (tokens, d) states that enter the layer, in the order of a walk.
        targets: (tokens, d) states that should leave it.
        without: paths in the layer of an attention that is left out, and of the norm before it; empty keeps both.
    """

    context: ModelContext
    layer: int
    inputs: Tensor
    targets: Tensor
    without: tuple[str, ...] = ()

    @property
    def documents(self) -> Documents:
        """The calibration text."""
        return self.context.documents

    @property
    def module(self) -> nn.Module:
        """The layer; its weights stay unchanged."""
        return self.context.layers[self.layer]

    @cached_property
    def batches(self) -> DocumentBatches:
        """The text, as batches."""
        from replaceme.training.training import DocumentBatches

        return DocumentBatches(self.documents.in_walk_order(), next(self.module.parameters()).device)

    def rows(self, states: Tensor, documents: Sequence[int]) -> Tensor:
        """Return the rows of documents from states (tokens, d) in the order of a walk, float32."""
        import torch

        parts = [states[self.starts[index] : self.starts[index] + len(self.batches.texts[index])] for index in documents]
        return self._to_device(torch.cat(parts))

    @cached_property
    def starts(self) -> list[int]:
        """Each document's first row of the states."""
        return (self.batches.lengths.cumsum(0) - self.batches.lengths).tolist()

    @cached_property
    def fixed(self) -> dict[str, Tensor]:
        """The layer's buffers and untrained weights, in float32."""
        kept = {name: value.detach() for name, value in self.module.named_parameters() if self._is_left_out(name)}
        return {name: self._to_device(value) for name, value in {**kept, **dict(self.module.named_buffers())}.items()}

    def trainable_parameters(self) -> dict[str, Tensor]:
        """Return float32 copies of the layer's parameters to train, by name."""
        return {
            name: parameter.detach().float().clone().requires_grad_()
            for name, parameter in self.module.named_parameters()
            if not self._is_left_out(name)
        }

    def training_context(self) -> AbstractContextManager[None]:
        """Silence the attention inside the block, if it is left out."""
        from replaceme.models.layers import silence_attention

        return silence_attention(self.module.get_submodule(self.without[0])) if self.without else nullcontext()

    def loss(self, parameters: Mapping[str, Tensor], documents: Sequence[int]) -> float:
        """Return the mean squared error, over the real tokens of documents, with the given parameters; add its gradients."""
        batch = self.batches.batch(documents)
        outputs = batch.real(self.states(parameters, batch, self.rows(self.inputs, documents)))
        loss = (outputs - self.rows(self.targets, documents)).square().mean()
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())

    def states(self, parameters: Mapping[str, Tensor], batch: Batch, rows: Tensor) -> Tensor:
        """Return the layer's output (documents, longest, d) for the input ``rows`` (tokens, d)."""
        from torch.func import functional_call
        from torch.utils import _pytree as trees

        from replaceme.models.layers import replace_input, tensor_of

        args, kwargs = trees.tree_map(self._to_device, self._call_arguments(batch))
        arguments = replace_input(args, kwargs, batch.padded(rows))
        return tensor_of(functional_call(self.module, {**parameters, **self.fixed}, *arguments))

    def _call_arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the model's call of the layer on a batch; the layers before it compute nothing."""
        import torch

        from replaceme.models.families import decoder_of
        from replaceme.models.layers import skip_layers

        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append((args, kwargs))
            raise _LayerReachedError

        model, family, layers = self.context.model, self.context.family, self.context.layers
        handle = self.module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad(), skip_layers(family, layers[: self.layer]):
                first = next(model.parameters()).device
                decoder_of(model)(input_ids=batch.input_ids.to(first), use_cache=False)
        except _LayerReachedError:
            pass
        finally:
            handle.remove()
        return given[0]

    def _is_left_out(self, name: str) -> bool:
        return name.startswith(tuple(f"{path}." for path in self.without))

    def _to_device(self, value: Any) -> Any:
        """Return a value; a tensor on the training's device, its floats in float32."""
        import torch

        if not isinstance(value, torch.Tensor):
            return value
        return value.to(self.batches.device, torch.float32 if value.is_floating_point() else value.dtype)


class _LayerReachedError(Exception):
    """Ends a forward pass before the layer."""


def check(params: Params, model: Model, family: Family) -> None:
    """Refuse a bare MLP where it is not derived: attention and MLP in parallel, or a norm after the MLP."""
    from replaceme.models.own_form import check_own_form

    if Training.of(params).llm_streamline_form != "mlp":
        return
    kind, problems = model.config().model_type, []
    if family.parallel:
        problems.append(
            f"llm_streamline_form: mlp is not derived for the family '{kind}', whose attention and MLP are parallel; use layer."
        )
    if family.obstacle and family.obstacle != "experts":
        problems.append(f"llm_streamline_form: mlp is not derived for {family.obstacle_words(kind)}; use layer.")
    if problems:
        raise ParameterError(problems)
    if not params.plain:
        check_own_form(model.config())


METHOD = Method(
    settings=Training,
    common={"plain": Use(("repair",), "llm_streamline_form", ("mlp",))},
    # A fitted map predicts the loss with a trained layer better than an empty cut does.
    surrogate=lambda params: "map",
    solve=leave_empty("LLM-Streamline"),
    criterion=WINDOW,
    fit_on_model=train_layer,
    trained=True,
    words="trains one layer in the place of one block",
    selections=("angular", "residual", "loss"),
    several=False,
    repairs=False,
    packed=False,
    check=check,
)
