"""Prove that the exported folder computes what was solved for.

The folder is reloaded as any user would load it. Every weight that no edit names must be the original's, bit for bit, and one
that was folded or mixed what that comes to but for its last bit. The computation is compared with the dense model's under the
edits, unfused (``replaceme.edits.unfused``): hidden states behind each host and logits must agree up to the rounding of the
stored weights. Generation with the KV cache must equal generation without.
"""

import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from replaceme.base.documents import Documents
from replaceme.base.errors import VerificationError
from replaceme.edits.edits import Edits
from replaceme.edits.fold import edited_parameters
from replaceme.edits.unfused import unfused
from replaceme.models.families import Family, parameter_of
from replaceme.models.layers import tensor_of
from replaceme.models.model import Model, stored_dtype, working_dtype

# Rows of a weight that are compared at once.
ROWS = 4096
DOCUMENTS, TOKENS, LOGITS, GENERATED = 2, 256, 32, 16
# Mean over tokens of the relative error of the state at the cut: rounding of the stored weights, with room for
# cancellation. Single tokens can be several times worse: a fit with large coefficients cancels more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# The layers behind the cut can amplify that error.
LOGITS_FACTOR = 10
CACHE_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "float16": 5e-2, "bfloat16": 2e-1}


def verify_export(dense: Model, pruned: Model, edits: Edits, documents: Documents) -> dict[str, Any]:
    """Compare the exported folder with the unfused computation on calibration text.

    Returns:
        The figures for metrics/export.json.

    Raises:
        VerificationError: an error is larger than the stored dtype's rounding explains.
    """
    family, excerpts = dense.family(), documents.head(DOCUMENTS, TOKENS)
    wrong = wrong_weights(dense.load(), pruned.load(), family, edits)
    if wrong:
        raise VerificationError(f"export: {wrong[0]} is not what the original and the edits make of it; nothing was saved.")
    # A model of our own form refers to itself: it goes only when somebody looks for such circles.
    gc.collect()
    dtype, tolerance = working_dtype(dense), TOLERANCE[stored_dtype(pruned)]
    hosts = _hosts(edits, int(dense.config().num_hidden_layers))
    position = {layer: edits.position(layer) for layer in hosts}
    whole, prompt = dense.load(dtype), excerpts.documents[0][: TOKENS // 4]
    expected, expected_logits = _states(whole, family, hosts, excerpts, edits)
    # Where a token's experts are chosen, rounding can choose others: the dense model's own cache shows by how much.
    cache_limit = max(CACHE_TOLERANCE[dtype], 2 * cache_error(whole, prompt) if family.experts else 0)
    del whole
    gc.collect()
    shortened = pruned.load(dtype)
    found, found_logits = _states(shortened, family, list(position.values()), excerpts, None)
    # Where a scalar was folded, the state is so much smaller; where the stream is narrower, it is in a basis of its own.
    errors = torch.cat([_relative_errors(expected[layer], edits.as_dense(layer, found[position[layer]])) for layer in hosts])
    of_logits = _relative_errors(expected_logits, found_logits)
    # Most tokens keep their experts.
    usual = torch.median if family.experts else torch.mean
    figures = {
        "hidden_error_max": float(errors.max()),
        "hidden_error_mean": float(usual(errors)),
        "logits_error": float(usual(of_logits)),
        "cache_error": cache_error(shortened, prompt),
        "tolerance": tolerance,
    }
    for figure, limit, what in (
        ("hidden_error_mean", tolerance, "the state at the cut differs from the unfused computation"),
        ("logits_error", LOGITS_FACTOR * tolerance, "the logits differ from the unfused computation's"),
        ("cache_error", cache_limit, "generation with the KV cache differs from generation without"),
    ):
        # Written so that NaN fails too.
        if not figures[figure] <= limit:
            raise VerificationError(
                f"export: {what} by {figures[figure]:.2g} (at most {limit:.2g} is rounding); nothing was saved."
            )
    return figures


def wrong_weights(dense: Any, pruned: Any, family: Family, edits: Edits) -> list[str]:
    """Return the names of weights that are neither the original's nor, where they are edited, what that makes of it."""
    layers = family.decoder_layers(dense)
    kept = [layer for layer in range(len(layers)) if layer not in set(edits.removed_layers)]
    originals, weights, wrong = dict(dense.named_parameters()), dict(pruned.named_parameters()), []
    for name, exact in edited_parameters(dense, family, layers, edits):
        weight = parameter_of(pruned, name)
        del weights[name]
        if weight.shape != exact.shape:
            wrong.append(name)
            continue
        # A part at a time: an embedding in float64 would be larger than a small model.
        if not all(map(_to_its_last_bit, weight.split(ROWS), exact.split(ROWS))):
            wrong.append(name)
    prefix = f"{family.layers}."
    for name, weight in weights.items():
        original = name
        if name.startswith(prefix):
            position, _, rest = name.removeprefix(prefix).partition(".")
            original = f"{prefix}{kept[int(position)]}.{rest}"
        if not torch.equal(weight, originals[original]):
            wrong.append(name)
    return wrong


@torch.inference_mode()
def cache_error(model: Any, prompt: Tensor) -> float:
    """Return the largest difference between the logits of generation with the KV cache and of one pass without it.

    Relative to the largest logit. Greedy tokens are generated with the cache; then one pass over the whole text, without
    a cache, must give the same logits at each of them.
    """
    # A config of its own: the model's may ask for beams or sampling, or end early.
    greedy = GenerationConfig(
        max_new_tokens=GENERATED,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    model.generation_config = greedy
    output = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), generation_config=greedy)
    cached = torch.cat(output.logits)
    full = model(output.sequences, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float((cached - full).abs().max() / full.abs().max())


def _to_its_last_bit(weight: Tensor, exact: Tensor) -> bool:
    """Return whether a weight is at most one step of its format from what it is to be; absolute where that is subnormal."""
    limits = torch.finfo(weight.dtype)
    step = limits.eps * exact.abs().clamp_min(limits.smallest_normal)
    return bool(((weight.double() - exact).abs() <= step).all())


def _hosts(edits: Edits, layers: int) -> list[int]:
    """Return the kept layers in front of each removed run: the cuts; where no layer goes, the last one."""
    removed = set(edits.removed_layers)
    if not removed:
        return [layers - 1]
    return [layer for layer in range(layers - 1) if layer not in removed and layer + 1 in removed]


@torch.inference_mode()
def _states(
    model: Any, family: Family, observed: list[int], documents: Documents, edits: Edits | None
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the states behind the observed layers, (tokens, d) each, and the last positions' logits of each document."""
    layers = family.decoder_layers(model)
    states: dict[int, list[Tensor]] = {layer: [] for layer in observed}
    logits = []
    with ExitStack() as hooks:
        if edits:
            hooks.enter_context(unfused(model, family, edits))
        for layer in observed:
            hooks.callback(layers[layer].register_forward_hook(_keeping(states[layer])).remove)
        for document in documents.documents:
            logits.append(model(document[None], use_cache=False, logits_to_keep=LOGITS).logits[0])
    return {layer: torch.cat(parts) for layer, parts in states.items()}, torch.cat(logits)


def _keeping(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        kept.append(tensor_of(output)[0].clone())

    return hook


def _relative_errors(expected: Tensor, found: Tensor) -> Tensor:
    return (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
