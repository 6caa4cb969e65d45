"""LLM-Pruner (arXiv 2305.11627, section 3): remove the heads and MLP channels with the least effect on the loss.

A group of coupled parameters is a key/value head with its queries (their rows, and the columns of the output projection that
read them) or a channel of the MLP (its rows of the first linears and its column of the last one). A layer's output is a sum
over its groups, so that removing one leaves the others unchanged. The importance is a first-order estimate of the change of the
loss,

    importance = Σ |w · ∂L/∂w|  over the weights of the group,

after one backward pass over a few short texts. Each layer loses the same numbers of heads and channels, its least important
ones. With ``plain``, every layer does, in numbers that the family's own config can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from replaceme.base.combinations import Use, Values
from replaceme.base.errors import ParameterError
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.edits.model_edit import ModelEdit
from replaceme.methods.method import Method, MethodContext, leave_empty
from replaceme.selection.criteria import WIDTH

if TYPE_CHECKING:
    from torch import Tensor, nn

    from replaceme.base.documents import Documents
    from replaceme.models.families import Family, Linear
    from replaceme.models.model import Model

# The first and last layers that stay whole (published: layers 4 to 30 of 32 lose parts).
FIRST, LAST = 4, 2
# Texts of the backward pass and tokens of each (section 4.1), and the seed of their choice.
CROPS, LENGTH, SEED = 10, 64, 0


@dataclass(frozen=True)
class RemovedGroups(ModelEdit):
    """Layers that lose groups.

    Attributes:
        kept: (layer, linear) → which groups of the linear's inputs stay, (groups,) bool. The groups divide these inputs, and
            the outputs of the linears before, into equal parts, in order.
        shapes: (layer, path of a linear within it) → its outputs and inputs after the cut; empty where the family's own config
            says them.
    """

    kind = "removed_groups"
    reshapes = True
    kept: dict[tuple[int, Linear], Tensor]
    shapes: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)

    @contextmanager
    def unfused(self, model: nn.Module, family: Family) -> Iterator[None]:
        """Set the features of removed groups to 0 before the last linear."""
        from replaceme.models.families import inputs_of

        with ExitStack() as stack:
            for (layer, linear), groups in self.kept.items():
                last = family.linear_of(family.decoder_layers(model)[layer], linear)
                stack.callback(last.register_forward_pre_hook(_masking(features_of(groups, inputs_of(last)))).remove)
            yield

    def edited_parameters(self, model: nn.Module, family: Family, layers: nn.ModuleList) -> Iterator[tuple[int, str, Tensor]]:
        """Yield the weights and biases without the removed groups' rows and columns (``ModelEdit``)."""
        from replaceme.base.accelerators import to_float64
        from replaceme.models.families import parameter_of

        for (layer, linear), groups in self.kept.items():
            for name, dimension in family.cut_parameters(layers[layer], linear).items():
                yield layer, name, cut(to_float64(parameter_of(layers[layer], name)), groups, dimension)

    def own_form(self, layers: str, position: Callable[[int], int]) -> dict[str, Any]:
        """Return the shapes of the linears that differ from those in the config."""
        shapes = {(position(layer), path): [*shape] for (layer, path), shape in self.shapes.items()}
        return {"linears": {f"{layers}.{at}.{path}": shape for (at, path), shape in sorted(shapes.items())}} if shapes else {}

    def tensors(self) -> dict[str, Tensor]:
        """Return ``kept.<layer>.<linear>``, (groups,) bool each."""
        return {f"kept.{layer}.{linear}": groups for (layer, linear), groups in self.kept.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the shapes, as rows."""
        return {"shapes": [[*key, *shape] for key, shape in sorted(self.shapes.items())]}

    @classmethod
    def from_stored(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Read what ``to_json`` and ``tensors`` returned."""
        from replaceme.edits.edits import stored_keys

        kept: dict[Any, Tensor] = {at: tensors[f"kept.{at[0]}.{at[1]}"] for at in stored_keys(tensors, "kept")}
        return cls(kept, {(layer, path): (outputs, inputs) for layer, path, outputs, inputs in content["shapes"]})


def features_of(groups: Tensor, features: int) -> Tensor:
    """Return which features stay, (features,) bool; ``groups`` (groups,) bool divide them into equal parts, in order."""
    return groups.repeat_interleave(features // len(groups))


def cut(parameter: Tensor, groups: Tensor, dimension: int) -> Tensor:
    """Return a parameter without the features of removed groups.

    Args:
        parameter: a weight (outputs, inputs) or a bias (outputs,).
        groups: which groups stay, (groups,) bool.
        dimension: the dimension that the groups divide into equal parts, in order.
    """
    kept = features_of(groups, parameter.shape[dimension]).nonzero()[:, 0]
    return parameter.index_select(dimension, kept.to(parameter.device))


def _masking(kept: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Not a product: infinity times 0 is NaN.
        return args[0].masked_fill(~kept.to(args[0].device), 0), *args[1:]

    return hook


def cut_shapes(
    family: Family, layers: nn.ModuleList, kept: Mapping[tuple[int, Linear], Tensor]
) -> dict[tuple[int, str], tuple[int, int]]:
    """Return the remaining outputs and inputs of each cut linear, by its layer and its path in the layer."""
    from replaceme.models.families import parameter_of

    shapes = {}
    for (layer, linear), groups in kept.items():
        for name, dimension in family.cut_parameters(layers[layer], linear).items():
            path, _, kind = name.rpartition(".")
            if kind == "weight":
                shape = [*parameter_of(layers[layer], name).shape]
                shape[dimension] = int(features_of(groups, shape[dimension]).sum())
                shapes[layer, path] = (shape[0], shape[1])
    return shapes


@dataclass(frozen=True)
class RemovableGroups:
    """The groups of attention and MLP that can be removed, the same from each of some layers.

    Attributes:
        layers: the layers.
        counts: number of groups in a layer, by linear.
        sizes: number of parameters in a group, by linear.
        layer_size: number of parameters in a layer.
    """

    layers: range
    counts: Mapping[Linear, int]
    sizes: Mapping[Linear, int]
    layer_size: int

    @classmethod
    def of(cls, model: Any, family: Family, layers: range) -> Self:
        """Return those of some layers of a model, whose weights need not be loaded."""
        from replaceme.models.families import inputs_of, parameter_of
        from replaceme.models.model import parameter_count

        layer, config = family.decoder_layers(model)[layers[0]], model.config
        counts: dict[Linear, int] = {
            "attention_output": int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
            "mlp_output": inputs_of(family.linear_of(layer, "mlp_output")),
        }
        sizes = {
            linear: sum(parameter_of(layer, name).numel() for name in family.cut_parameters(layer, linear)) // count
            for linear, count in counts.items()
        }
        return cls(layers, counts, sizes, parameter_count(layer))

    def parameters(self, removed: Mapping[Linear, int]) -> int:
        """Return the number of parameters in these groups, over all the layers."""
        return len(self.layers) * sum(count * self.sizes[linear] for linear, count in removed.items())

    def without(self, removed: Mapping[Linear, int]) -> dict[Linear, int]:
        """Return how many groups of a layer are left."""
        return {linear: count - removed[linear] for linear, count in self.counts.items()}

    @property
    def max_layers(self) -> int:
        """The largest removable number of parameters, in whole layers: a head and a channel of each layer stay."""
        return self.parameters({linear: count - 1 for linear, count in self.counts.items()}) // self.layer_size

    def choose_counts(
        self, layers_to_skip: float, fits: Callable[[Mapping[Linear, int]], bool] = lambda kept: True
    ) -> dict[Linear, int]:
        """Return how many groups to remove from each layer, to match the parameters of whole layers.

        Heads and channels lose the same share, but for rounding: heads are rounded to the nearest number, at least one where
        that is not too much, and channels make up for the difference.

        Args:
            layers_to_skip: the number of whole layers.
            fits: whether a model can have the kept groups.

        Raises:
            ParameterError: so many parameters can't be removed.
        """
        target = layers_to_skip * self.layer_size / len(self.layers)
        heads, channels = self.counts["attention_output"], self.counts["mlp_output"]
        nearest = heads * target * len(self.layers) / self.parameters(self.counts)
        by_heads = {
            count: round((target - count * self.sizes["attention_output"]) / self.sizes["mlp_output"]) for count in range(heads)
        }
        possible = [count for count, rest in by_heads.items() if 0 <= rest < channels]
        if not possible:
            raise ParameterError(
                f"layers_to_skip: {layers_to_skip} layers have more parameters than the heads and channels of layers "
                f"{self.layers[0]}–{self.layers[-1]} can lose; use {self.max_layers} at most."
            )
        for count in sorted(possible, key=lambda count: (count == 0, abs(count - nearest))):
            removed: dict[Linear, int] = {"attention_output": count, "mlp_output": by_heads[count]}
            if fits(self.without(removed)):
                return removed
        raise ParameterError(
            "plain: the family's own config can't say what would be left of its layers' heads and channels; use false."
        )


def choose_layers(params: Params, count: int) -> range:
    """Return the layers that lose groups, of a model with ``count`` layers.

    Raises:
        ParameterError: there are none.
    """
    if params.plain:
        return range(count)
    layers = range(params.min_distance_layer or FIRST, params.max_distance_layer or count - LAST)
    if not layers:
        raise ParameterError(
            f"min_distance_layer: of the model's {count} layers, none is between layer {layers.start} and layer {layers.stop}; "
            f"set it and max_distance_layer (null takes nothing from the first {FIRST} layers and the last {LAST})."
        )
    return layers


def choose_groups(params: Params, model: Any, family: Family) -> tuple[RemovableGroups, dict[Linear, int]]:
    """Return the removable groups, and how many of them to remove from each layer; weights need not be loaded.

    Raises:
        ParameterError: so much can't be removed.
    """
    groups = RemovableGroups.of(model, family, choose_layers(params, len(family.decoder_layers(model))))

    def fits(kept: Mapping[Linear, int]) -> bool:
        return not params.plain or is_describable(model, family, groups, kept)

    return groups, groups.choose_counts(params.layers_to_skip, fits)


def is_describable(model: Any, family: Family, groups: RemovableGroups, kept: Mapping[Linear, int]) -> bool:
    """Return whether the family's own class, with such a config, has layers of exactly these groups."""
    from replaceme.models.families import parameter_of
    from replaceme.models.width import build_changed

    built = build_changed(model.config, cut_config_entries(model.config, kept))
    if built is None:
        return False
    dense, changed_layer = family.decoder_layers(model)[0], family.decoder_layers(built)[0]
    return all(
        parameter_of(changed_layer, name).shape[dimension] * count == parameter_of(dense, name).shape[dimension] * kept[linear]
        for linear, count in groups.counts.items()
        for name, dimension in family.cut_parameters(dense, linear).items()
    )


def cut_config_entries(config: Any, kept: Mapping[Linear, int]) -> dict[str, Any]:
    """Return the config's entries for the kept heads and channels."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    entries: dict[str, Any] = {"intermediate_size": kept["mlp_output"]}
    if kept["attention_output"] != groups:
        entries |= {"num_attention_heads": kept["attention_output"] * heads // groups, "head_dim": head_dim}
        if hasattr(config, "num_key_value_heads"):
            entries["num_key_value_heads"] = kept["attention_output"]
    return entries


def draw_crops(documents: Documents) -> Tensor:
    """Return pieces of the documents, (10, 64) token ids, in a seeded choice.

    Raises:
        ParameterError: there are not so many.
    """
    import torch

    from replaceme.base.documents import seeded_order

    pieces = [piece for document in documents.documents for piece in document.split(LENGTH) if len(piece) == LENGTH]
    if len(pieces) < CROPS:
        raise ParameterError(
            f"dataset_size: the calibration text has {len(pieces)} pieces of {LENGTH} tokens, and method llm_pruner takes "
            f"{CROPS}; use more documents, or longer ones (max_length)."
        )
    return torch.stack([pieces[index] for index in seeded_order(len(pieces), SEED)[:CROPS].tolist()])


def measure_importance(
    model: Any, family: Family, layers: Sequence[int], counts: Mapping[Linear, int], crops: Tensor
) -> tuple[dict[tuple[int, Linear], Tensor], float]:
    """Return the importance of each group, and the loss whose gradients give it.

    Each gradient is used and freed as soon as it is computed, so that only one is held; the backward pass ends at the first of
    the layers.

    Args:
        model: the loaded model; it is left unchanged.
        family: where its parts are.
        layers: the layers.
        counts: number of groups in a layer, by the linear that reads them.
        crops: (texts, tokens) ids.

    Raises:
        ModelError: weights of these layers are not on a device.
        ParameterError: the numbers overflow.
    """
    import torch

    from replaceme.base.accelerators import to_float64
    from replaceme.models.devices import require_resident
    from replaceme.models.layers import enable_gradients

    modules = family.decoder_layers(model)
    require_resident({layer: modules[layer] for layer in layers}, "whose gradients are needed")
    importance: dict[tuple[int, Linear], Tensor] = {
        (layer, linear): torch.zeros(count, dtype=torch.float64) for layer in layers for linear, count in counts.items()
    }

    def adding(total: Tensor, dimension: int) -> Callable[[nn.Parameter], None]:
        def add(weight: nn.Parameter) -> None:
            assert weight.grad is not None
            products = (weight.detach().float() * weight.grad.float()).abs()
            total.add_(to_float64(products.movedim(dimension, 0).reshape(len(total), -1)).sum(dim=1).cpu())
            weight.grad = None

        return add

    cuts = [
        (modules[layer].get_parameter(name), total, dimension)
        for (layer, linear), total in importance.items()
        for name, dimension in family.cut_parameters(modules[layer], linear).items()
    ]
    with ExitStack() as stack:
        stack.enter_context(enable_gradients(model, (weight for weight, _, _ in cuts)))
        for weight, total, dimension in cuts:
            stack.callback(weight.register_post_accumulate_grad_hook(adding(total, dimension)).remove)
        stack.enter_context(torch.enable_grad())
        ids = crops.to(model.device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    if not all(bool(total.isfinite().all()) for total in importance.values()):
        raise ParameterError("dtype: the model's gradients overflow; use float32.")
    return importance, float(loss.detach())


def keep_most_important(importance: Tensor, removed: int) -> Tensor:
    """Return which groups stay, (groups,) bool, without the ``removed`` least important ones; of equals, the first go."""
    import torch

    kept = torch.ones(len(importance), dtype=torch.bool)
    kept[importance.argsort(stable=True)[:removed]] = False
    return kept


def remove_groups(context: MethodContext) -> dict[str, Any]:
    """Add the kept groups to the edits, and return figures of the removed ones."""
    params, model, family, edits = context.params, context.model, context.family, context.edits
    groups, removed = choose_groups(params, model, family)
    importance, loss = measure_importance(model, family, groups.layers, groups.counts, draw_crops(context.documents))
    kept = {at: keep_most_important(values, removed[at[1]]) for at, values in importance.items() if removed[at[1]]}
    if params.plain:
        edits.config = cut_config_entries(model.config, groups.without(removed))
    edits.model_edit = RemovedGroups(kept, {} if params.plain else cut_shapes(family, context.layers, kept))
    heads = model.config.num_attention_heads // groups.counts["attention_output"]
    which = "every layer" if params.plain else f"each of layers {groups.layers[0]}–{groups.layers[-1]}"
    edits.parts = f"{_in_words(groups, removed, heads)} in {which}"
    figures = {
        "removed_heads": len(groups.layers) * removed["attention_output"] * heads,
        "removed_channels": len(groups.layers) * removed["mlp_output"],
        "parameters_removed": groups.parameters(removed),
        "parameters_wanted": params.layers_to_skip * groups.layer_size,
        "calibration_loss": loss,
    }
    logger.info(
        "repair: %s go, %d parameters; %.3g layers have %d", edits.parts, figures["parameters_removed"],
        params.layers_to_skip, figures["parameters_wanted"],
    )  # fmt: skip
    return figures


def _in_words(groups: RemovableGroups, removed: Mapping[Linear, int], heads: int) -> str:
    """Return the removed heads (``heads`` in each group) and channels, in words."""
    attention, mlp = removed["attention_output"], removed["mlp_output"]
    parts = [f"{heads * attention} of {heads * groups.counts['attention_output']} heads"] if attention else []
    parts += [f"{mlp} of {groups.counts['mlp_output']} MLP channels"] if mlp else []
    return " and ".join(parts)


def check(params: Params, model: Model, family: Family) -> None:
    """Refuse families whose heads can't be cut out, more than can be removed, and text too short for the gradients."""
    from replaceme.models.own_form import check_own_form

    config = model.config()
    if obstacle := family.head_pruning_obstacle:
        raise ParameterError(
            f"method: llm_pruner is refused for the family '{config.model_type}': {obstacle}; use another method."
        )
    if not params.plain:
        check_own_form(config)
    choose_groups(params, model.skeleton(config), family)
    pieces = params.max_length // LENGTH
    if not pieces:
        raise ParameterError(
            f"max_length: method llm_pruner takes pieces of {LENGTH} tokens; use at least {LENGTH}, not {params.max_length}."
        )
    if params.dataset_size * pieces < CROPS:
        raise ParameterError(
            f"dataset_size: method llm_pruner takes {CROPS} pieces of {LENGTH} tokens, and documents of at most "
            f"{params.max_length} tokens have {pieces} each; use at least {-(-CROPS // pieces)}, not {params.dataset_size}."
        )


def refuses(values: Values) -> list[str]:
    """Return a sentence for each setting that would be ignored, or that makes gradients overflow."""
    problems = []
    if values["dtype"] == "float16":
        problems.append("dtype: float16 is too short for the gradients of method llm_pruner; use bfloat16 or float32.")
    return problems + [
        f"{key}: with plain, method llm_pruner takes from every layer; use null."
        for key in ("min_distance_layer", "max_distance_layer")
        if values["plain"] and values[key] is not None
    ]


METHOD = Method(
    common={"plain": Use(("repair",))},
    solve=leave_empty("LLM-Pruner"),
    criterion=WIDTH,
    fit_on_model=remove_groups,
    words="removes parts of layers, not whole layers",
    selections=(),
    several=False,
    repairs=False,
    packed=False,
    refuses=refuses,
    check=check,
)
