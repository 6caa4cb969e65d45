"""Check on text that the parts recognised in an undescribed family are all that its layers add to the residual stream."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.base.accelerators import to_float64
from replaceme.base.documents import Batch, Documents
from replaceme.base.progress import logger
from replaceme.models.context import ModelContext
from replaceme.models.families import Family
from replaceme.models.recognition import recognition_error
from replaceme.statistics.walk import Signal, Signals, signals_for, walk

# Size of the check: documents, and tokens of each.
DOCUMENTS, TOKENS = 2, 128


def prove(model: Any, family: Family, documents: Documents) -> None:
    """Compare, in every layer, the sum of the recognised parts' outputs with what the layer adds to its input.

    Raises:
        ModelError: they differ by more than rounding.
    """
    kind = model.config.model_type
    proofs = [_Proof(layer, index, family, kind) for index, layer in enumerate(family.decoder_layers(model))]
    returned: list[Any] = []
    hook = family.decoder_layers(model)[0].register_forward_hook(lambda _module, _args, output: returned.append(output))
    try:
        walk(ModelContext(model, family, documents.head(DOCUMENTS, TOKENS), DOCUMENTS), proofs, description=None)
    finally:
        hook.remove()
    if not isinstance(returned[0], Tensor):
        raise recognition_error(kind, "its layers return more than their states")
    logger.info("%s: in each of the %d layers, the parts that were recognised are all that it adds", kind, len(proofs))


class _Proof:
    """Observer that checks a layer's addition against its attention and MLP, and its MLP against its last linear."""

    def __init__(self, layer: nn.Module, index: int, family: Family, kind: str):
        self.linear, self.index, self.kind = family.linear_of(layer, "mlp_output"), index, kind

    def signals(self) -> Mapping[int, frozenset[Signal]]:
        return signals_for([self.index], "input", "attention", "mlp_features", "mlp", "output")

    def observe(self, layer: int, signals: Signals, batch: Batch) -> None:
        before, attention, mlp, after = (
            to_float64(batch.real(signals[name])) for name in ("input", "attention", "mlp", "output")
        )
        linear = to_float64(batch.real(self.linear(signals["mlp_features"])))
        # Per token, since one of huge norm would hide the others; the comparisons are false for NaN.
        eps = torch.finfo(signals["output"].dtype).eps
        rounding = eps * sum(part.norm(dim=-1) for part in (before, attention, mlp, after))
        if not bool(((after - before - attention - mlp).norm(dim=-1) <= rounding).all()):
            raise recognition_error(self.kind, f"layer {layer} adds something else than what its attention and its MLP return")
        if not bool(((mlp - linear).norm(dim=-1) <= 4 * eps * mlp.norm(dim=-1)).all()):
            raise recognition_error(self.kind, f"the MLP of layer {layer} returns something else than its last linear")
