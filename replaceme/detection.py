"""A family that nobody described: propose where its parts are from a model's structure, and prove it on real text.

The proposal looks for the list of decoder layers and, in a layer, for an attention and an MLP that end in linears of the hidden
width. It holds when, in every layer, what leaves each linear is what its block returns, and what both return is what the layer
adds to its input: then the fold of a map is exact. What else a cut may change (attention patterns, a scale of the layer's
index) is for the export's verification.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.documents import Batch, Documents
from replaceme.errors import ModelError
from replaceme.families import Family, linears_within, parameter_of
from replaceme.forward import Signal, Signals, ask, walk
from replaceme.progress import logger

ATTENTION = re.compile("attn|attention", re.IGNORECASE)
MLP = re.compile("mlp|feed_?forward|ffn|^ff$", re.IGNORECASE)
NORM = re.compile("norm|^ln", re.IGNORECASE)
# Real text of the proof.
DOCUMENTS, TOKENS = 2, 128


def proposed_family(model: Any) -> Family:
    """Return what the structure suggests; the weights may be on the meta device.

    Raises:
        ModelError: a part was not found.
    """
    config = model.config
    if not hasattr(config, "num_hidden_layers"):
        raise _refusal(config.model_type, "its config has no num_hidden_layers, as where one model is made of several")
    kind, count, width = config.model_type, int(config.num_hidden_layers), int(config.hidden_size)
    lists = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if not lists:
        raise _refusal(kind, f"no list of its {count} layers was found")
    layer = model.get_submodule(lists[0])[0]
    if any(parameter.ndim > 2 and min(parameter.shape) > 1 for parameter in layer.parameters()):
        raise _refusal(kind, "its layers hold weights of three dimensions, as a mixture of experts does")
    attention = _block(kind, layer, ATTENTION, "attention")
    mlp = _block(kind, layer, MLP, "MLP")
    if any(isinstance(part, nn.ModuleList) for part in layer.get_submodule(mlp).modules()):
        raise _refusal(kind, "its MLP is a list of them, as a mixture of experts is")
    ends = _last_linear(kind, layer, attention, width), _last_linear(kind, layer, mlp, width)
    for other in model.get_submodule(lists[0]):
        if not {attention, mlp, *ends} <= {name for name, _ in other.named_modules()}:
            raise _refusal(kind, "its layers are not all alike")
    lengths = {name: len(value) for name, value in config.to_dict().items() if isinstance(value, list)}
    return Family(
        layers=lists[0],
        attention=attention,
        attention_output=ends[0],
        mlp=mlp,
        mlp_output=ends[1],
        per_layer=tuple(name for name, length in lengths.items() if length == count),
        detected=True,
        uncut="nobody described its parts",
    )


def prove(model: Any, family: Family, documents: Documents) -> None:
    """Compare, in every layer and on real text, what the proposed parts return with what the layer adds to its input.

    Raises:
        ModelError: they differ by more than rounding.
    """
    kind = model.config.model_type
    proofs = [_Proof(layer, index, family, kind) for index, layer in enumerate(family.decoder_layers(model))]
    returned: list[Any] = []
    hook = family.decoder_layers(model)[0].register_forward_hook(lambda _module, _args, output: returned.append(output))
    try:
        walk(model, family, documents.head(DOCUMENTS, TOKENS), proofs, batch_size=DOCUMENTS, description=None)
    finally:
        hook.remove()
    if not isinstance(returned[0], Tensor):
        raise _refusal(kind, "its layers return more than their states")
    logger.info("%s: in each of the %d layers, the parts that were recognised are all that it adds", kind, len(proofs))


class _Proof:
    """Observer that compares what a layer adds with what its attention and its MLP return, and this with the last linear's."""

    def __init__(self, layer: nn.Module, index: int, family: Family, kind: str):
        self.linear, self.index, self.kind = family.linear_of(layer, "mlp_output"), index, kind

    def wants(self) -> Mapping[int, frozenset[Signal]]:
        return ask([self.index], "input", "attention", "mlp_features", "mlp", "output")

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        before, attention, mlp, after = (batch.real(signals[name]).double() for name in ("input", "attention", "mlp", "output"))
        linear = batch.real(self.linear(signals["mlp_features"])).double()
        # Token by token: one of huge norm must not hide the others. Written so that NaN fails too.
        eps = torch.finfo(signals["output"].dtype).eps
        rounding = eps * sum(part.norm(dim=-1) for part in (before, attention, mlp, after))
        if not bool(((after - before - attention - mlp).norm(dim=-1) <= rounding).all()):
            raise _refusal(self.kind, f"layer {layer} adds something else than what its attention and its MLP return")
        if not bool(((mlp - linear).norm(dim=-1) <= 4 * eps * mlp.norm(dim=-1)).all()):
            raise _refusal(self.kind, f"the MLP of layer {layer} returns something else than its last linear")


def _block(kind: str, layer: nn.Module, name: re.Pattern[str], what: str) -> str:
    found = [
        path for path, part in layer.named_children() if name.search(path) and not NORM.search(path) and linears_within(part)
    ]
    if len(found) != 1:
        raise _refusal(kind, f"its layers have {'no' if not found else 'more than one'} {what} that ends in a linear")
    return found[0]


def _last_linear(kind: str, layer: nn.Module, path: str, width: int) -> str:
    linears = linears_within(layer.get_submodule(path))
    fitting = [name for name, linear in linears.items() if parameter_of(linear, "weight").shape[0] == width]
    if not fitting:
        raise _refusal(kind, f"no linear of width {width} ends its {path}")
    return f"{path}.{fitting[-1]}".removesuffix(".")


def _refusal(kind: str, reason: str) -> ModelError:
    return ModelError(f"model_path: the family '{kind}' is not described, and was not recognised: {reason}.")
