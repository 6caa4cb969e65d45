"""The dtypes of a model's weights: the one that most are stored in, and the ones that comparisons compute in.

Models of up to 8 GB are compared in float32, so that a difference is the edit's and not a rounding's; above, whole models are
compared as they are stored.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from replaceme.base.errors import ModelError
from replaceme.models.model_files import WEIGHTS

if TYPE_CHECKING:
    from replaceme.models.model import Model

# Up to this size of the stored weights, comparisons run in float32.
FLOAT32_BYTES = 8 << 30
# The formats that weights can be computed in, by their names in safetensors.
FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_dtype(model: Model) -> torch.dtype:
    """Return the dtype that most weights are stored in, by their entries. Raises ModelError when torch can't compute in it."""
    entries: Counter[str] = Counter()
    for stored in model.stored.values():
        # Old files also hold byte masks.
        if "F" in stored.format:
            entries[stored.format] += stored.entries
    ((usual, _),) = entries.most_common(1) or [("none", 0)]
    if usual not in FORMATS:
        raise ModelError(
            f"model_path: most weights of {model.name} are stored in {usual}; give one in bfloat16, float16 or float32."
        )
    return FORMATS[usual]


def working_dtype(model: Model) -> str:
    """Return the dtype for comparisons of whole models: ``computed_dtype``, or the stored one from ``FLOAT32_BYTES`` on."""
    size = sum(path.stat().st_size for path in model.files(WEIGHTS))
    return dtype_name(stored_dtype(model)) if size > FLOAT32_BYTES else computed_dtype(model)


def computed_dtype(model: Model) -> str:
    """Return the dtype that comparisons compute in: float32, or float64 for weights that are stored so."""
    return "float64" if stored_dtype(model) == torch.float64 else "float32"


def proof_dtypes(model: Model) -> tuple[str, str]:
    """Return the dtypes in which a streamed model is compared: of what is outside the layers, as stored, and of the layers."""
    return dtype_name(stored_dtype(model)), computed_dtype(model)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the prefix ``torch.``."""
    return str(dtype).removeprefix("torch.")


def is_finite(*tensors: Tensor) -> bool:
    """Return whether tensors hold neither NaN nor infinity. Least and largest entries tell, much faster than isfinite."""
    finite = defaultdict[torch.device, list[Tensor]](list)
    for tensor in tensors:
        if tensor.is_floating_point() and not tensor.is_meta and tensor.numel():
            finite[tensor.device].append(torch.stack(tensor.aminmax()).isfinite().all())
    # One reading of a device for all.
    return all(bool(torch.stack(each).all()) for each in finite.values())
