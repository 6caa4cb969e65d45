"""The number format in which a comparison shows the rounding of the stored weights alone."""

import torch
from safetensors import safe_open

from replaceme.models import WEIGHTS, Model

# Up to this size of the stored weights, a comparison runs in float32.
FLOAT32_BYTES = 8 << 30


def stored_dtype(model: Model) -> torch.dtype:
    """Return the format of the stored weights; old files hold masks of bytes beside them."""
    with safe_open(model.files(WEIGHTS)[0], "pt") as weights:
        return next(tensor.dtype for name in weights.keys() if (tensor := weights.get_tensor(name)).is_floating_point())  # noqa: SIM118


def working_dtype(model: Model) -> str:
    """Return the name of the format to compare in: float32 where there is memory for it, else the stored one."""
    stored, size = stored_dtype(model), sum(path.stat().st_size for path in model.files(WEIGHTS))
    return str(stored).removeprefix("torch.") if stored == torch.float64 or size > FLOAT32_BYTES else "float32"
