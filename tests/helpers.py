"""What tests of more than one room use: calls of the console scripts, made-up documents and edits, and plain references."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from replaceme.base.documents import Documents
from replaceme.base.plan import Block
from replaceme.edits.edits import Edits
from replaceme.edits.fold import apply_edits
from replaceme.edits.unfused import unfused
from replaceme.models.context import ModelContext
from replaceme.models.families import Family, Linear, family_of, parameter_of
from replaceme.selection.candidate_evaluation import Losses
from replaceme.solvers.procrustes import polar_factor
from tests.conftest import LAYERS, WIDTH, made_model

TEXT = torch.arange(2, 42)[None]

FAST = ["--dtype", "float32", "--eval_dtype", "float32", "--threads", "1", "--max_length", "48", "--dataset_size", "20"]


def context_of(model: Any, documents: Documents, batch_size: int = 4, folder: Path | None = None) -> ModelContext:
    """Return the context of a model of a described family."""
    return ModelContext(model, family_of(model.config), documents, batch_size, folder)


def call(command: Callable[[], Any], *arguments: str | Path, code: int = 0) -> None:
    """Run a console script in this process."""
    before, sys.argv = sys.argv, ["command", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            command()
    finally:
        sys.argv = before
    assert ended.value.code == code


def means(losses: Sequence[Losses]) -> list[float]:
    """Return the mean of each over all tokens."""
    return [each.mean for each in losses]


def many_documents(count: int = 30) -> Documents:
    """Return random documents of 3 to 39 tokens."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(3, 40, (count,), generator=generator).tolist()
    return Documents([torch.randint(2, 400, (length,), generator=generator) for length in lengths])


def made_transform(seed: int = 0) -> torch.Tensor:
    """Return a random map near the identity, (WIDTH, WIDTH) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(WIDTH, dtype=torch.float64) + 0.3 * torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)


def edits_for(start: int, length: int) -> Edits:
    """Return edits that remove ``length`` layers and transform their host's MLP output."""
    return Edits("test", list(range(start, start + length)), {start - 1: made_transform()})


def mixing(*blocks: Block) -> Edits:
    """Return edits that merge blocks into the layers before them."""
    mixtures = {block.layer_before_cut: block.mixture for block in blocks}
    return Edits("test", [layer for block in blocks for layer in block.layers], mixtures=mixtures)


def edits_of(start: int, length: int, model: Any) -> Edits:
    """Return edits with everything that folds in the model's family.

    That is a transform of the host, and corrections of both linears of the host and of the first layer after the cut; with
    experts a transform alone.
    """
    family = family_of(model.config)
    edits, generator = edits_for(start, length), torch.Generator().manual_seed(1)
    layers = family.decoder_layers(model)
    if family.norm_after_mlp:
        rotation = polar_factor(made_transform())
        gains = torch.linspace(-0.5, 2, WIDTH, dtype=torch.float64)
        edits.transforms[start - 1] = rotation * gains
    if family.experts:
        return edits
    for layer in {start - 1, min(start + length, LAYERS - 1)} - {*edits.removed_layers}:
        linears: tuple[Linear, ...] = ("attention_output", "mlp_output")
        for linear in linears:
            module = family.linear_of(layers[layer], linear)
            weight = 0.1 * torch.randn(parameter_of(module, "weight").shape, generator=generator)
            bias = None if getattr(module, "bias", None) is None else 0.1 * torch.randn(WIDTH, generator=generator)
            edits.correct(layer, linear, weight, bias)
    return edits


def norm_in_float64(model: Any, family: Family) -> None:
    """Make the norms after the MLPs compute in float64; the library's use float32 whatever the model's dtype."""
    for layer in family.decoder_layers(model):
        norm = layer.get_submodule(family.mlp)
        eps = getattr(norm, "eps", None) or norm.variance_epsilon
        norm.forward = lambda x, norm=norm, eps=eps: (
            x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (norm.weight + family.norm_offset)
        )


def ridge(
    g: np.ndarray, r: np.ndarray, w: np.ndarray, prior: np.ndarray, size: float | np.ndarray, constant: bool
) -> np.ndarray:
    """Return (Σ w gᵀg + λD)⁻¹ (Σ w gᵀr + λD prior), (features, d); λ is one, or one a feature."""
    S = (g.T * w) @ g
    # A feature that is always zero gets nothing.
    D = np.diag(np.where(np.diag(S) > 0, size * np.diag(S), 1))
    if constant:
        D[-1, -1] = 0
    return np.linalg.solve(S + D, (g.T * w) @ r + D @ prior)


def loss_without(kind: str, removed: list[int], documents: Documents) -> float:
    """Return the mean loss of a model whose layers are really gone."""
    model = made_model(kind)
    apply_edits(model, family_of(model.config), Edits("", removed))
    total, count = 0.0, 0
    with torch.no_grad():
        for document in documents.documents:
            logits = model(document[None], use_cache=False).logits[0, :-1]
            total += float(cross_entropy(logits, document[1:], reduction="sum"))
            count += len(document) - 1
    return total / count


def layer_outputs(model: torch.nn.Module, document: torch.Tensor) -> list[torch.Tensor]:
    """Return the embedding and every layer's output, (tokens, d) each, by plain hooks."""
    kept: list[torch.Tensor] = []
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda _m, a, k: kept.append(a[0][0]), with_kwargs=True)]
    hooks += [layer.register_forward_hook(lambda _m, _a, output: kept.append(output[0])) for layer in model.model.layers]
    with torch.no_grad():
        model(document[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def passing(model: Any, layer: int, documents: Documents) -> dict[str, np.ndarray]:
    """Return the activations of a layer, by plain hooks: all tokens, document by document without padding.

    ``input``; ``A`` and ``G``, which enter the linears that end attention and MLP; ``attention`` and ``M``, which these add to
    the residual stream; ``middle``, the state between them; ``output``. Each is (tokens, width) float64.
    """
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("input", "A", "attention", "G", "M", "output")}
    family = family_of(model.config)
    module = family.decoder_layers(model)[layer]

    def before(name: str) -> Any:
        return lambda _, args, kwargs: kept[name].append((args[0] if args else kwargs["hidden_states"]).flatten(0, -2).clone())

    def after(name: str) -> Any:
        return lambda _m, _a, output: kept[name].append(
            (output if isinstance(output, torch.Tensor) else output[0]).flatten(0, -2).clone()
        )

    part = module.get_submodule
    hooks = [
        module.register_forward_pre_hook(before("input"), with_kwargs=True),
        part(family.attention_output).register_forward_pre_hook(before("A"), with_kwargs=True),
        part(family.attention).register_forward_hook(after("attention")),
        part(family.mlp).register_forward_hook(after("M")),
        module.register_forward_hook(after("output")),
    ]
    if not family.experts:
        hooks.append(part(family.mlp_output).register_forward_pre_hook(before("G"), with_kwargs=True))
    with torch.no_grad():
        for document in documents.documents:
            model(document[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    found = {name: torch.cat(parts).double().numpy() for name, parts in kept.items() if parts}
    scaled = {name: found[name] * family.multiplier for name in ("attention", "M")}
    return found | scaled | {"middle": found["input"] + scaled["attention"]}


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    """Return the logits of ``TEXT``, (1, tokens, vocabulary)."""
    logits: torch.Tensor = model(TEXT, use_cache=False).logits
    return logits


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all weights of a model's folder."""
    return {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Let a function change the tensors in a model's only file of weights."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@torch.no_grad()
def hooked_and_folded(model: Any, family: Family, edits: Edits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of ``TEXT`` with the edits unfused, and after they are folded into the model, which is changed."""
    before = logits_of(model)
    with unfused(model, family, edits):
        hooked = logits_of(model)
    assert torch.equal(logits_of(model), before), "the hooks of the edits changed the model"
    apply_edits(model, family, edits)
    return hooked, logits_of(model)


@torch.no_grad()
def shortened_logits(model: Any, edits: Edits, text: torch.Tensor) -> torch.Tensor:
    """Run the kept layers in order, each with the arguments that the whole model gives it, and return the logits.

    A transform is applied to the layer's output: ``h − M + M T``; corrections by plain hooks on the linears.
    """
    family, whole = family_of(model.config), {}
    layers = family.decoder_layers(model)

    def note(index: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            whole[index] = args, kwargs

        return hook

    def correcting(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        def hook(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output + args[0] @ weight.T.to(output) + (0 if bias is None else bias.to(output))

        return hook

    hooks = [layer.register_forward_pre_hook(note(index), with_kwargs=True) for index, layer in enumerate(layers)]
    model(text, use_cache=False)
    for hook in hooks:
        hook.remove()
    state = (whole[0][0] or [whole[0][1]["hidden_states"]])[0]
    for index, layer in enumerate(layers):
        if index in edits.removed_layers:
            continue
        mlp: list[torch.Tensor] = []
        hooks = [
            layer.get_submodule(
                family.attention_output if name == "attention_output" else family.mlp_output
            ).register_forward_hook(correcting(*change))
            for (place, name), change in edits.corrections.items()
            if place == index and not (name == "mlp_output" and index in edits.transforms)
        ]
        if index in edits.transforms:
            module = layer.get_submodule(family.mlp)
            hooks.append(module.register_forward_hook(lambda _m, _a, output, kept=mlp: kept.append(output.clone())))
            if (index, "mlp_output") in edits.corrections:
                features: list[torch.Tensor] = []
                linear = layer.get_submodule(family.mlp_output)
                hooks.append(linear.register_forward_pre_hook(lambda _, args, kept=features: kept.append(args[0])))
        own = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        # With a norm after the MLP, a change of the rotated weight is no summand of the output.
        by_hand = family.norm_after_mlp and index in edits.transforms and (index, "mlp_output") in edits.corrections
        if by_hand:
            T, (change, _) = edits.transforms[index], edits.corrections[index, "mlp_output"]
            weight, norm = layer.get_submodule(family.mlp_output).weight, layer.get_submodule(family.mlp).weight
            weight.copy_((T / T.norm(dim=0)).T @ weight.double() + change)
            norm.copy_(T.norm(dim=0) - family.norm_offset)
        args, kwargs = whole[index]
        given = {**kwargs, "hidden_states": state} if not args else kwargs
        output = layer(*([state, *args[1:]] if args else []), **given)
        for hook in hooks:
            hook.remove()
        for name, value in own.items():
            layer.get_parameter(name).copy_(value)
        state = output[0] if isinstance(output, tuple) else output
        if index in edits.transforms and not by_hand:
            (added,) = mlp
            # With a norm after the MLP, the transform takes the norm's output before its weight.
            weighed = added.double() / family.norm_weight(layer) if family.norm_after_mlp else added.double()
            change = (weighed @ edits.transforms[index] - added.double()).reshape(state.shape)
            weight, bias = edits.corrections.get((index, "mlp_output"), (None, None))
            if weight is not None:
                change = change + (features[0].double() @ weight.T.double() + (0 if bias is None else bias)).reshape(
                    state.shape
                )
            state = (state.double() + family.multiplier * change).to(state.dtype)
        if index in edits.operators:
            operator = edits.operators[index].to(state.dtype)
            state = state @ operator if operator.ndim == 2 else state * operator
    last = layers[-1].register_forward_hook(lambda _m, _a, out: (state, *out[1:]) if isinstance(out, tuple) else state)
    logits: torch.Tensor = model(text, use_cache=False).logits
    last.remove()
    return logits


class Elsewhere(torch.Tensor):
    """A tensor that stands on another device than the CPU, for tests on a machine without one: it reports ``meta`` and holds
    its values on the CPU. Within ``elsewhere()``, an operation on it and on a CPU tensor fails as on a real device.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        # With its strides: which products an operation is made of depends on them, and so do the last bits.
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _elsewhere(operation, args, kwargs or {})


class elsewhere(TorchDispatchMode):  # noqa: N801
    """Context in which the device ``meta`` has values: tensors made on it or moved to it are ``Elsewhere``."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # in inference mode, operations made of others come whole
            parts = operation.decompose(*args, **(kwargs or {}))
        return _elsewhere(operation, args, kwargs or {}) if parts is NotImplemented else parts


def _elsewhere(operation: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, Elsewhere)]
    asked = kwargs.get("device")
    copies = operation is torch.ops.aten.copy_.default
    strangers = [each for each in tensors if each.ndim and not isinstance(each, Elsewhere)]
    assert copies or not there or not strangers, f"{operation} mixes devices"
    held = tree_map(lambda each: each.held if isinstance(each, Elsewhere) else each, (args, kwargs))
    result = operation(*held[0], **{**held[1], **({"device": "cpu"} if asked is not None else {})})
    if copies:
        return args[0]
    goes = torch.device(asked).type == "meta" if asked is not None else bool(there)
    return tree_map(lambda each: Elsewhere(each) if goes and isinstance(each, torch.Tensor) else each, result)


def mean_loss(model: torch.nn.Module, documents: Documents) -> float:
    """Return the mean next-token loss over all tokens, from the definition: nats per token."""
    total, count = 0.0, 0
    for document in documents.documents:
        with torch.no_grad():
            likelihood = model(document[None], use_cache=False).logits[0].log_softmax(-1)
        total -= sum(float(likelihood[place, document[place + 1]]) for place in range(len(document) - 1))
        count += len(document) - 1
    return total / count
