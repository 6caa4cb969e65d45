"""Prove that the exported folder computes what was solved for.

The reference is the dense model, unfused: its own weights, ``M T`` in place of the host's ``M`` by a hook, and the removed
layers bypassed. The folder, reloaded as any user would load it, must give the same hidden states behind each host and the
same logits, up to the rounding of its stored weights; and generation with the KV cache must equal generation without.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor, nn

from replaceme.documents import Documents
from replaceme.edits import Edits
from replaceme.errors import VerificationError
from replaceme.families import Family
from replaceme.forward import tensor_of
from replaceme.models import Model

DOCUMENTS, TOKENS, GENERATED = 2, 256, 16
# Largest relative error of a token's state at the cut: rounding of the stored weights, with room for cancellation.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CACHE_TOLERANCE = 1e-2


def verify_export(dense: Model, pruned: Model, edits: Edits, documents: Documents) -> dict[str, Any]:
    """Compare the exported folder with the unfused computation on calibration text.

    Returns:
        The figures for metrics/export.json.

    Raises:
        VerificationError: an error is larger than the stored dtype's rounding explains.
    """
    family, excerpts = dense.family(), documents.head(DOCUMENTS, TOKENS)
    stored = _stored_dtype(pruned)
    dtype = _working_dtype(dense, stored)
    hosts = _observed_layers(edits, int(dense.config().num_hidden_layers))
    expected, expected_logits = _states(dense.load(dtype), family, hosts, excerpts, edits)
    shortened = pruned.load(dtype)
    shift = {layer: layer - sum(removed < layer for removed in edits.removed_layers) for layer in hosts}
    found, found_logits = _states(shortened, family, [shift[layer] for layer in hosts], excerpts, None)
    worst = max(_relative_errors(expected[layer], found[shift[layer]]).max().item() for layer in hosts)
    mean = sum(_relative_errors(expected[layer], found[shift[layer]]).mean().item() for layer in hosts) / len(hosts)
    figures = {
        "hidden_error_max": worst,
        "hidden_error_mean": mean,
        "logits_error": float((found_logits - expected_logits).norm() / expected_logits.norm()),
        "cache_error": cache_error(shortened, excerpts.documents[0][: TOKENS // 4]),
        "tolerance": TOLERANCE[stored],
    }
    if not worst <= figures["tolerance"]:
        raise VerificationError(
            f"export: the folded model's state at the cut differs from the unfused computation by {worst:.2g} "
            f"(at most {figures['tolerance']:.2g} is rounding); nothing was saved."
        )
    if not figures["cache_error"] <= CACHE_TOLERANCE:
        raise VerificationError(
            f"export: generation with the KV cache differs from generation without by {figures['cache_error']:.2g}; "
            "nothing was saved."
        )
    return figures


@torch.inference_mode()
def cache_error(model: Any, prompt: Tensor) -> float:
    """Return the largest difference between the logits of generation with the KV cache and of one pass without it.

    Relative to the largest logit. Greedy tokens are generated with the cache; then one pass over the whole text, without
    a cache, must give the same logits at each of them.
    """
    output = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=GENERATED, min_new_tokens=GENERATED,
        do_sample=False, use_cache=True, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
    )  # fmt: skip
    cached = torch.cat(output.logits)
    full = model(output.sequences, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float((cached - full).abs().max() / full.abs().max())


def _stored_dtype(model: Model) -> torch.dtype:
    with safe_open(model.files(("*.safetensors",))[0], "pt") as weights:
        dtype: torch.dtype = weights.get_tensor(next(iter(weights.keys()))).dtype
    return dtype


def _working_dtype(dense: Model, stored: torch.dtype) -> str:
    """Float32 where it fits, so that only the stored weights' rounding shows; else the stored format."""
    if stored == torch.float64:
        return "float64"
    weights = sum(path.stat().st_size for path in dense.files(("*.safetensors",)))
    needed = weights * 4 / stored.itemsize
    return "float32" if needed < 0.6 * psutil.virtual_memory().available else str(stored).removeprefix("torch.")


def _observed_layers(edits: Edits, layers: int) -> list[int]:
    """Return the kept layers in front of each removed run: the cuts."""
    removed = set(edits.removed_layers)
    return [layer for layer in range(layers - 1) if layer not in removed and layer + 1 in removed]


@torch.inference_mode()
def _states(
    model: Any, family: Family, observed: list[int], documents: Documents, unfused: Edits | None
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the states behind the observed layers, (tokens, d) each, and the last position's logits of each document."""
    layers = family.decoder_layers(model)
    states: dict[int, list[Tensor]] = {layer: [] for layer in observed}
    logits = []
    with ExitStack() as hooks:
        if unfused:
            for layer, transform in unfused.transforms.items():
                hooks.callback(family.mlp_of(layers[layer]).register_forward_hook(_transforming(transform)).remove)
            for layer in unfused.removed_layers:
                hooks.callback(layers[layer].register_forward_hook(_bypass, with_kwargs=True).remove)
        for layer in observed:
            hooks.callback(layers[layer].register_forward_hook(_keeping(states[layer])).remove)
        for document in documents.documents:
            logits.append(model(document[None], use_cache=False, logits_to_keep=1).logits[0])
    return {layer: torch.cat(parts) for layer, parts in states.items()}, torch.cat(logits)


def _transforming(transform: Tensor) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Tensor:
        added = tensor_of(output)
        return (added.double() @ transform).to(added.dtype)

    return hook


def _bypass(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    unchanged = args[0] if args else kwargs["hidden_states"]
    return unchanged if isinstance(output, Tensor) else (unchanged, *output[1:])


def _keeping(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.append(tensor_of(output)[0].clone())

    return hook


def _relative_errors(expected: Tensor, found: Tensor) -> Tensor:
    return (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
