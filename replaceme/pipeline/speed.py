"""The speedup of the pruned model: prefill and decoding of both models, measured in one run.

Times vary between runs and machines, so they are no part of the pipeline's cached results: they are measured on demand and
stored in a folder of their own, with the checksums of the weights. Rounds of the dense and the pruned model alternate, so that
other work on the machine slows both; the medians are compared.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from replaceme.base.accelerators import is_accelerator, synchronize
from replaceme.base.errors import ModelError
from replaceme.base.fingerprints import sha256_of
from replaceme.base.parameters import Params
from replaceme.base.progress import progress
from replaceme.models.devices import kind_of, resolve_device, use_processor
from replaceme.models.formats import resolve_formats
from replaceme.models.kv_cache import cache_arguments, fill_cache
from replaceme.models.model import Model, positions_of
from replaceme.models.model_files import WEIGHTS
from replaceme.running.machine import machine

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 64, 5


def measure_speed(params: Params, dense: Model, pruned: Model) -> dict[str, Any]:
    """Measure both models and return the times.

    Args:
        params: of which ``eval_dtype``, ``device``, ``device_map``, ``threads`` and ``eval_batch_size`` (rows) are used.
        dense: the dense model's files.
        pruned: the pruned model's.

    Returns:
        ``prefill_seconds`` (of one batch of prompts) and ``decode_seconds_per_token``, each with ``dense``, ``pruned`` and
        ``speedup`` (dense / pruned); the setting; ``machine``, in words; and ``weights``, the SHA-256 of the pruned model's
        weight files.

    Raises:
        ModelError: a prompt and the new tokens don't fit the model's positions.
    """
    params = resolve_formats(params, dense)
    use_processor(params.threads)
    device = resolve_device(params.device)
    models = {
        name: model.load(params.eval_dtype, device, device_map=params.device_map)
        for name, model in (("dense", dense), ("pruned", pruned))
    }
    generator = torch.Generator().manual_seed(0)
    room = positions_of(models["dense"].config) - NEW_TOKENS
    if room < 2:
        raise ModelError(
            f"model_path: {dense.name} takes {room + NEW_TOKENS} tokens, and a measurement needs {NEW_TOKENS + 2} at least; "
            "measure a model that takes more."
        )
    shape = (params.eval_batch_size, min(PROMPT_TOKENS, room))
    prompt = torch.randint(int(models["dense"].config.vocab_size), shape, generator=generator)
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in models} for kind in ("prefill", "decode")}
    # The first round is a warm-up and isn't counted.
    for number in progress(range(ROUNDS + 1), "dense and pruned model in turn", "rounds"):
        for name, model in models.items():
            prefill, decode = _time_model(model, prompt.to(model.device))
            if number:
                times["prefill"][name].append(prefill)
                times["decode"][name].append(decode)
    return {
        "prefill_seconds": _compare_medians(times["prefill"]),
        "decode_seconds_per_token": _compare_medians(times["decode"]),
        "prompt_tokens": shape[1],
        "new_tokens": NEW_TOKENS,
        "rounds": ROUNDS,
        **describe_setting(params),
        "machine": machine(),
        "weights": sha256_of(pruned.files(WEIGHTS), pruned.folder),
    }


def describe_setting(params: Params) -> dict[str, Any]:
    """Return the settings that times depend on besides the models."""
    device = resolve_device(params.device)
    return {
        "batch_size": params.eval_batch_size,
        "dtype": params.eval_dtype,
        "device": kind_of(device) if is_accelerator(device) else device,
        "threads": params.threads,
    }


@torch.inference_mode()
def _time_model(model: Any, prompt: Tensor) -> tuple[float, float]:
    """Return the seconds of one prefill, and per token of greedy decoding with a KV cache."""
    devices = list_gpus(model)
    prefill, cache = measure_seconds(lambda: fill_cache(model, prompt[:, :-1]), devices)
    token = prompt[:, -1:]

    def decode() -> None:
        nonlocal token
        for _ in range(NEW_TOKENS):
            token = model(token, **cache_arguments(model, cache)).logits[:, -1:].argmax(-1)

    seconds, _ = measure_seconds(decode, devices)
    return prefill, seconds / NEW_TOKENS


def list_gpus(model: Any) -> list[torch.device]:
    """Return the GPUs that hold a model's weights: several, where ``device_map`` spreads it."""
    return sorted({weight.device for weight in model.parameters() if is_accelerator(weight.device)}, key=str)


def measure_seconds(work: Callable[[], Any], devices: Iterable[torch.device]) -> tuple[float, Any]:
    """Return the seconds until ``work`` is done on these GPUs, and its result."""
    began = _read_clock(devices)
    result = work()
    return _read_clock(devices) - began, result


def _read_clock(devices: Iterable[torch.device]) -> float:
    for device in devices:
        synchronize(device)
    return time.perf_counter()


def _compare_medians(times: dict[str, list[float]]) -> dict[str, float]:
    dense, pruned = (statistics.median(times[name]) for name in ("dense", "pruned"))
    return {"dense": dense, "pruned": pruned, "speedup": dense / pruned}
