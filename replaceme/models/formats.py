"""The number format that a processor or a GPU computes a model in fastest: float32 or bfloat16.

Most processors have no fast products of bfloat16: without AMX, or cores that multiply bfloat16 at the full rate, float32 takes
half the time. So a fraction of a second of products of the model's shapes decides, once on a machine.
"""

import time
from contextlib import suppress
from typing import Any

import torch
from torch.nn import functional

from replaceme.base.accelerators import has_bfloat16, synchronize
from replaceme.base.files import cache_folder, read_remembered, write_json
from replaceme.base.parameters import Params, size_of
from replaceme.base.progress import logger
from replaceme.models.devices import kind_of, resolve_device, total_memory, use_processor
from replaceme.models.memory import format_size
from replaceme.models.model import Model
from replaceme.models.width import WIDTHS

# How many times faster bfloat16 must be: float32 is more exact, and two measurements differ.
CLEARLY = 1.25
# Operations and tokens of a product that is measured, and how often it is.
OPERATIONS, MOST_TOKENS, ROUNDS = 4e9, 2048, 4
# The part of the machine's memory that the weights of all processes may take in float32.
MEMORY_PART = 0.5


def resolve_formats(params: Params, model: Model) -> Params:
    """Return the parameters with the model's format in place of auto."""
    keys = [key for key in ("dtype", "eval_dtype") if getattr(params, key) == "auto"]
    return params.model_copy(update=dict.fromkeys(keys, choose_format(params, model))) if keys else params


def choose_format(params: Params, model: Model) -> str:
    """Return the format for a model: on a GPU bfloat16 if it is fast there, else float32; float16, which overflows, never.

    On a processor it is the faster one, unless the weights take too much memory in float32.
    """
    device = resolve_device(params.device)
    if device != "cpu":
        known = has_bfloat16(device)
        return _fastest(model.config(), params.threads, device) if known is None else "bfloat16" if known else "float32"
    size = sum(tensor.entries for tensor in model.stored.values()) * torch.float32.itemsize
    allowed = MEMORY_PART * total_memory() / params.processes
    if params.memory not in (None, "auto"):
        allowed = min(allowed, size_of(str(params.memory)))
    if params.use_4bit or size > allowed:
        return "bfloat16"
    chosen = _fastest(model.config(), params.threads, device)
    if chosen == "float32":
        logger.info("dtype: auto is float32, which this processor computes faster; the weights take %s", format_size(size))
    return chosen


def _fastest(config: Any, threads: int, device: str) -> str:
    """Return the faster format for products of a model's shapes; this device's earlier answer, if there is one."""
    width = int(config.hidden_size)
    inputs = next((int(value) for name in WIDTHS if (value := getattr(config, name, None))), 4 * width)
    memory, key = cache_folder() / "formats.json", f"{kind_of(device)}, {threads} threads, {width} x {inputs}"
    known: dict[str, str] = read_remembered(memory)
    if key not in known:
        use_processor(threads)
        seconds = measure_products(width, inputs, device)
        known[key] = "bfloat16" if seconds["float32"] >= CLEARLY * seconds["bfloat16"] else "float32"
        with suppress(OSError):  # it is measured again
            write_json(memory, known)
    return known[key]


@torch.inference_mode()
def measure_products(width: int, inputs: int, device: str) -> dict[str, float]:
    """Return the least seconds of a product of states and a weight of an MLP, by format."""
    tokens = max(64, min(MOST_TOKENS, int(OPERATIONS / (2 * width * inputs))))
    factors = torch.full((tokens, width), 0.5, device=device), torch.full((inputs, width), 0.5, device=device)
    least = dict.fromkeys(("float32", "bfloat16"), float("inf"))
    for _ in range(ROUNDS):
        for format in least:
            states, weight = (factor.to(getattr(torch, format)) for factor in factors)
            synchronize(device)
            began = time.perf_counter()
            functional.linear(states, weight)
            synchronize(device)
            least[format] = min(least[format], time.perf_counter() - began)
    return least
