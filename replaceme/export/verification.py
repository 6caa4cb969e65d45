"""Verify that the exported folder computes the dense model with its edits.

The folder is loaded as a user would load it. Three checks:

- weights: unedited ones equal the original's bit for bit; edited ones equal the exact values up to their last bit;
- computation: the hidden states after each host and the logits equal those of the dense model with unfused edits
  (``replaceme.edits.unfused``), up to the rounding of the stored weights;
- cache: generation with the KV cache equals generation without it.
"""

import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.base.documents import Documents
from replaceme.base.errors import VerificationError
from replaceme.edits.edits import Edits
from replaceme.edits.fold import edited_parameters
from replaceme.edits.unfused import unfused
from replaceme.models.families import Family, parameter_of
from replaceme.models.layers import tensor_of
from replaceme.models.model import Model, stored_dtype, working_dtype

# Rows of a weight compared at once.
ROWS = 4096
DOCUMENTS, TOKENS, LOGITS, GENERATED = 2, 256, 32, 16
# By stored dtype, the mean over tokens of the state's relative error at the cut that rounding explains, with room for
# cancellation. Single tokens can be several times worse: a fit with large coefficients cancels more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# The layers after the cut can amplify that error.
LOGITS_FACTOR = 10
CACHE_TOLERANCE = {"float64": 1e-6, "float32": 1e-2, "float16": 5e-2, "bfloat16": 2e-1}


def verify_export(dense: Model, pruned: Model, edits: Edits, documents: Documents) -> dict[str, Any]:
    """Compare the exported folder with the unfused computation on calibration text.

    Args:
        dense: the original model.
        pruned: the exported folder.
        edits: the edits that were applied.
        documents: calibration text; the first few documents are used.

    Returns:
        The figures for metrics/export.json.

    Raises:
        VerificationError: an error is larger than rounding to the stored dtype explains.
    """
    family, excerpts = dense.family(), documents.head(DOCUMENTS, TOKENS)
    wrong = wrong_weights(dense.load(), pruned.load(), family, edits)
    if wrong:
        raise VerificationError(f"export: {wrong[0]} differs from the original with the edits applied; nothing was saved.")
    # A model of our own form refers to itself, and only the garbage collector frees such a cycle.
    gc.collect()
    dtype, tolerance = working_dtype(dense), TOLERANCE[stored_dtype(pruned)]
    hosts = _hosts(edits, int(dense.config().num_hidden_layers))
    position = {layer: edits.position(layer) for layer in hosts}
    whole, prompt = dense.load(dtype), excerpts.documents[0][: TOKENS // 4]
    expected, expected_logits = _states(whole, family, hosts, excerpts, edits)
    # Rounding can send a token to other experts. The dense model's own cache error shows how much that changes.
    cache_limit = max(CACHE_TOLERANCE[dtype], 2 * cache_error(whole, prompt) if family.experts else 0)
    del whole
    gc.collect()
    shortened = pruned.load(dtype)
    found, found_logits = _states(shortened, family, list(position.values()), excerpts, None)
    # A folded scalar makes the state smaller, and a narrower stream has another basis: ``as_dense`` undoes both.
    errors = torch.cat([_relative_errors(expected[layer], edits.as_dense(layer, found[position[layer]])) for layer in hosts])
    of_logits = _relative_errors(expected_logits, found_logits)
    # The median, for experts: most tokens keep theirs.
    usual = torch.median if family.experts else torch.mean
    figures = {
        "hidden_error_max": float(errors.max()),
        "hidden_error_mean": float(usual(errors)),
        "logits_error": float(usual(of_logits)),
        "cache_error": cache_error(shortened, prompt),
        "tolerance": tolerance,
    }
    for figure, limit, difference in (
        ("hidden_error_mean", tolerance, "the state at the cut differs from the unfused computation"),
        ("logits_error", LOGITS_FACTOR * tolerance, "the logits differ from the unfused computation's"),
        ("cache_error", cache_limit, "generation with the KV cache differs from generation without"),
    ):
        # In this form NaN fails too.
        if not figures[figure] <= limit:
            raise VerificationError(
                f"export: {difference} by {figures[figure]:.2g} (at most {limit:.2g} is rounding); nothing was saved."
            )
    return figures


def wrong_weights(dense: Any, pruned: Any, family: Family, edits: Edits) -> list[str]:
    """Return the names of weights that differ from the original's or, where edited, from the exact value by over one step."""
    layers = family.decoder_layers(dense)
    kept = [layer for layer in range(len(layers)) if layer not in set(edits.removed_layers)]
    originals, weights, wrong = dict(dense.named_parameters()), dict(pruned.named_parameters()), []
    for name, exact in edited_parameters(dense, family, layers, edits):
        weight = parameter_of(pruned, name)
        del weights[name]
        if weight.shape != exact.shape:
            wrong.append(name)
            continue
        # In parts: a whole embedding in float64 can be larger than a small model.
        if not all(map(_within_one_step, weight.split(ROWS), exact.split(ROWS))):
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

    The difference is relative to the largest logit. Tokens are generated greedily with the cache; then one pass over prompt and
    tokens, (tokens,) int64, computes the same logits without it.
    """
    from transformers import GenerationConfig

    # Not the model's own config, which may ask for beams or sampling, or stop early.
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


def _within_one_step(weight: Tensor, exact: Tensor) -> bool:
    """Return whether a weight is within one step of its dtype from its exact value; the step is absolute for subnormals."""
    limits = torch.finfo(weight.dtype)
    step = limits.eps * exact.abs().clamp_min(limits.smallest_normal)
    return bool(((weight.double() - exact).abs() <= step).all())


def _hosts(edits: Edits, layers: int) -> list[int]:
    """Return the kept layer before each removed run; where no layer is removed, the last one."""
    removed = set(edits.removed_layers)
    if not removed:
        return [layers - 1]
    return [layer for layer in range(layers - 1) if layer not in removed and layer + 1 in removed]


@torch.inference_mode()
def _states(
    model: Any, family: Family, observed: list[int], documents: Documents, edits: Edits | None
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the states after the observed layers, (tokens, d) each, and the logits at the last positions of all documents."""
    layers = family.decoder_layers(model)
    states: dict[int, list[Tensor]] = {layer: [] for layer in observed}
    logits = []
    with ExitStack() as hooks:
        if edits:
            hooks.enter_context(unfused(model, family, edits))
        for layer in observed:
            hooks.callback(layers[layer].register_forward_hook(_recording(states[layer])).remove)
        for document in documents.documents:
            logits.append(model(document[None], use_cache=False, logits_to_keep=LOGITS).logits[0])
    return {layer: torch.cat(parts) for layer, parts in states.items()}, torch.cat(logits)


def _recording(states: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        states.append(tensor_of(output)[0].clone())

    return hook


def _relative_errors(expected: Tensor, found: Tensor) -> Tensor:
    """Return the relative error of each row, float64, of (rows, entries) tensors."""
    return (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
