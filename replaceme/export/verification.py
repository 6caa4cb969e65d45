"""Verify that the exported folder computes the dense model with its edits.

The folder is loaded as a user would load it. Four checks:

- config: it equals the original's with its layers cut, entry by entry, and the generation config is the original's;
- weights: unedited ones equal the original's bit for bit, in the files too; edited ones equal the exact values up to their
  last bit;
- computation: given the states of the dense model with unfused edits (``replaceme.edits.unfused``), each layer returns what
  that model's layer returns, up to the rounding of the layer's stored weights; so does the head. The error of the whole model,
  which grows with its layers, is reported;
- cache: generation with the KV cache equals generation without it.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from replaceme.base.documents import Documents
from replaceme.base.errors import VerificationError
from replaceme.base.progress import logger
from replaceme.edits.edits import Edits
from replaceme.edits.fold import edit_config, edited_parameters
from replaceme.edits.unfused import unfused
from replaceme.export.transformers4 import add_older_keys
from replaceme.models.dtypes import dtype_name, proof_dtypes, stored_dtype, working_dtype
from replaceme.models.families import Family, parameter_of
from replaceme.models.layers import input_of, replace_forward, replace_input, replace_output, tensor_of
from replaceme.models.memory import load_streamed, load_without_layers, measure_parts, stream_layers
from replaceme.models.model import Model, layer_count
from replaceme.models.own_form import is_own_form, own_config
from replaceme.models.streaming import read_value

# Rows of a weight compared at once.
ROWS = 4096
DOCUMENTS, TOKENS, LOGITS, GENERATED = 2, 256, 32, 16
# By stored dtype, the mean over tokens of the state's relative error after an edited layer that rounding explains, with room
# for cancellation. Single tokens can be several times worse: a fit with large coefficients cancels more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# Where no edit changes anything: the rounding of a float32 computation.
EXACT = TOLERANCE[torch.float32]
CACHE_TOLERANCE = 1e-2
HALF = (torch.bfloat16, torch.float16)
# Entries of the config that limit how far attention sees. For the proof they are made shorter than its text, in both models.
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
# Entries of a config that say where it came from, and those of our own form.
ORIGIN = {"transformers_version", "_name_or_path", "architectures", "torch_dtype"}
OWN_FORM = {"model_type", "auto_map", "tokenizer_class", "pruned"}
# The state that enters the first layer.
FIRST = -1


def verify_export(dense: Model, pruned: Model, edits: Edits, documents: Documents, budget: int | None = None) -> dict[str, Any]:
    """Compare the exported folder with the unfused computation on calibration text.

    Args:
        dense: the original model.
        pruned: the exported folder.
        edits: the edits that were applied.
        documents: calibration text; the first few documents are used.
        budget: the bytes that the weights of one of the two may take in memory, where they are streamed; None is without limit.

    Returns:
        The figures for metrics/export.json.

    Raises:
        VerificationError: an error is larger than rounding to the stored dtype explains.
    """
    family = dense.family()
    if entries := find_wrong_entries(dense, pruned, family, edits):
        raise _difference_error(entries[0])
    stored = [each.load_stored() if budget is None else load_streamed(each, None, budget) for each in (dense, pruned)]
    wrong, edited = find_wrong_weights(stored.pop(0), stored.pop(), family, edits)
    if wrong := wrong or find_wrong_tensors(dense, pruned, family, edits, edited):
        raise _difference_error(wrong[0])
    return _verify_computation(dense, pruned, edits, edited, documents.head(DOCUMENTS, TOKENS), budget)


def _verify_computation(
    dense: Model, pruned: Model, edits: Edits, edited: set[str], excerpts: Documents, budget: int | None
) -> dict[str, Any]:
    """Compare the states after each layer, the logits and the cached generation on ``excerpts``; return the figures."""
    family, load = dense.family(), _make_loader(dense, edits, excerpts, budget)
    kept = _list_kept_layers(dense, edits)
    position = {layer: edits.position(layer) for layer in kept}
    # The kept layer before each removed run; where no layer is removed, the last one.
    cuts = [layer for layer in kept if layer + 1 in edits.removed_layers] or kept[-1:]
    whole, prompt = load(dense), excerpts.documents[0][: TOKENS // 4]
    with _float32_computation(whole, family, edits.mixtures):
        expected, expected_logits = _record_states(whole, family, [FIRST, *kept], excerpts, edits)
        # Rounding can send a token to other experts. The dense model's own cache error shows how much that changes.
        own_cache_error = measure_cache_error(whole, prompt) if family.experts else 0.0
    del whole
    shortened = load(pruned)
    inputs = {FIRST: edits.as_pruned(0, expected[FIRST])} | {
        position[layer]: edits.as_pruned(layer + 1, expected[layer]) for layer in kept
    }
    with _float32_computation(shortened, family):
        actual, actual_logits = _record_states(shortened, family, [position[layer] for layer in cuts], excerpts, None)
        outputs, logits = _record_states(shortened, family, [*inputs], excerpts, None, inputs)
        of_cache, cache_limit = measure_cache_error(shortened, prompt), max(CACHE_TOLERANCE, 2 * own_cache_error)
    # A folded scalar makes the state smaller, and a narrower stream has another basis: ``as_dense`` undoes both.
    errors = torch.cat(
        [_compute_relative_errors(expected[layer], edits.as_dense(layer, actual[position[layer]])) for layer in cuts]
    )
    # The median, for experts: most tokens keep theirs.
    usual, tolerance = torch.median if family.experts else torch.mean, TOLERANCE[stored_dtype(pruned)]
    # None stands for what is outside of the layers.
    changed = {_find_layer(name, family) for name in edited}
    checks = [("the state that enters the layers differs", inputs[FIRST], outputs[FIRST], None in changed)]
    for layer, at in position.items():
        checks.append((f"the state after layer {layer} differs", inputs[at], outputs[at], at in changed))
    checks.append(("the logits differ", expected_logits, logits, None in changed or edits.scale(kept[-1] + 1) != 1))
    for what, state, own, rounded in checks:
        # What no edit changes has the same input and the same weights.
        error, limit = float(usual(_compute_relative_errors(state, own))), tolerance if rounded else min(EXACT, tolerance)
        # In this form NaN fails too.
        if not error <= limit:
            raise _precision_error(f"{what} from the unfused computation", error, limit)
    if not of_cache <= cache_limit:
        raise _precision_error("generation with the KV cache differs from generation without", of_cache, cache_limit)
    return {
        "hidden_error_max": float(errors.max()),
        "hidden_error_mean": float(usual(errors)),
        "logits_error": float(usual(_compute_relative_errors(expected_logits, actual_logits))),
        "cache_error": of_cache,
        "tolerance": tolerance,
    }


def _make_loader(dense: Model, edits: Edits, excerpts: Documents, budget: int | None) -> Callable[[Model], Any]:
    """Return a function that loads either model for the computation: whole, or streamed within ``budget``."""
    shorter = _shorten_windows(dense, excerpts)
    if budget is None:
        return partial(Model.load, dtype=working_dtype(dense), config=shorter)
    # Layers are read anew each time, in float32 at once; what is outside of them is widened where it computes.
    outside, inside = proof_dtypes(dense)
    mixed = {*edits.mixtures}.union(*edits.mixtures.values())

    def load(source: Model) -> Any:
        # More layers than are computed with at once would only take memory. The pruned model's can be larger: of our own form.
        needed = measure_parts(source, outside)[0] + (1 + len(mixed)) * measure_parts(source, inside)[1]
        model = load_without_layers(source, outside, layer_dtype=inside, config=shorter)
        return stream_layers(source, model, min(budget, needed))

    return load


def find_wrong_entries(dense: Model, pruned: Model, family: Family, edits: Edits) -> list[str]:
    """Return which entries of the config differ from the original's with its layers cut, and generation_config.json if it does.

    The config's dtype must be the one that most weights are stored in, whatever the original's says.
    """
    config = dense.config()
    edit_config(config, family, edits)
    expected, actual = (json.loads(each.to_json_string(use_diff=False)) for each in (config, pruned.config()))
    expected["dtype"] = dtype_name(stored_dtype(dense))
    for each in (expected, actual):
        # transformers 5 reads the scaling's older name too, and keeps both.
        (each.get("rope_parameters") or {}).pop("type", None)
    ignored = ORIGIN | (add_older_keys(actual).keys() - expected.keys())
    if is_own_form(pruned.folder):
        ignored |= OWN_FORM
        expected |= own_config(edits.own_form(family.layers))
    entries = sorted((expected.keys() | actual.keys()) - ignored)
    wrong = [f"{name} in config.json" for name in entries if expected.get(name) != actual.get(name)]
    files = [model.folder / "generation_config.json" for model in (dense, pruned)]
    before, after = (path.read_bytes() if path.is_file() else None for path in files)
    return wrong if before == after else [*wrong, files[0].name]


def find_wrong_weights(dense: Any, pruned: Any, family: Family, edits: Edits) -> tuple[list[str], set[str]]:
    """Compare the weights of the loaded models, each in the dtype that it is stored in.

    Returns:
        The names of weights that differ from the original's or, where edited, from the exact value by over one step; and the
        names of the edited ones.
    """
    layers = family.decoder_layers(dense)
    originals, weights, wrong, edited = dict(dense.named_parameters()), dict(pruned.named_parameters()), [], set()
    for name, exact in edited_parameters(dense, family, layers, edits):
        weight = parameter_of(pruned, name)
        edited.add(name)
        if weight.shape != exact.shape:
            wrong.append(name)
            continue
        # In parts: a whole embedding in float64 can be larger than a small model.
        if not all(map(_is_within_one_step, weight.split(ROWS), exact.split(ROWS))):
            wrong.append(name)
    kept = [layer for layer in range(len(layers)) if layer not in set(edits.removed_layers)]
    for name, weight in weights.items():
        if name not in edited and not _is_same(read_value(weight), read_value(originals[_find_dense_name(name, family, kept)])):
            wrong.append(name)
    return wrong, edited


def find_wrong_tensors(dense: Model, pruned: Model, family: Family, edits: Edits, edited: set[str]) -> list[str]:
    """Return the names of tensors in the pruned model's files that no edit changes, and that differ from the original's files.

    Args:
        dense: the original model.
        pruned: the exported folder.
        family: describes the model's parts.
        edits: the edits that were applied.
        edited: the names of the weights that they change, in the loaded model.
    """
    kept, originals, tensors = _list_kept_layers(dense, edits), dense.stored, pruned.stored
    prefix, wrong, alone = family.layers.partition(".")[0] + ".", [], 0
    # The files of some base models name their tensors without it.
    names = {name: name if name in edited or name.startswith(prefix) else prefix + name for name in tensors}
    # Layers with an edited weight that transformers converts, such as experts, which are stored one by one.
    converted = {_find_layer(name, family) for name in edited - {*names.values()}}
    for name, own in sorted(names.items()):
        if own in edited:
            continue
        original = _find_dense_name(own, family, kept)
        original = next((each for each in (original, original.removeprefix(prefix)) if each in originals), "")
        if original and _is_same(tensors[name].read(name), originals[original].read(original)):
            continue
        if original and _find_layer(own, family) not in converted:
            wrong.append(f"{name} in {tensors[name].file.name}")
        alone += 1
    if alone:
        logger.info(
            "export: %d of %d tensors were compared as loaded, not in the files: transformers converts them while loading",
            alone, len(tensors),
        )  # fmt: skip
    return wrong


@torch.inference_mode()
def measure_cache_error(model: Any, prompt: Tensor) -> float:
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


def _is_within_one_step(weight: Tensor, exact: Tensor) -> bool:
    """Return whether a weight is within one step of its dtype from its exact value; the step is absolute for subnormals."""
    limits = torch.finfo(weight.dtype)
    step = limits.eps * exact.abs().clamp_min(limits.smallest_normal)
    return bool(((weight.double() - exact).abs() <= step).all())


def _difference_error(what: str) -> VerificationError:
    return VerificationError(f"export: {what} differs from the original with the edits applied; nothing was saved.")


def _precision_error(what: str, error: float, limit: float) -> VerificationError:
    return VerificationError(f"export: {what} by {error:.2g} (at most {limit:.2g} is rounding); nothing was saved.")


def _is_same(weight: Tensor, original: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and values."""
    # ``torch.equal`` alone compares the values of different dtypes.
    return weight.dtype == original.dtype and torch.equal(weight, original)


def _list_kept_layers(dense: Model, edits: Edits) -> list[int]:
    return [layer for layer in range(layer_count(dense)) if layer not in set(edits.removed_layers)]


def _find_layer(name: str, family: Family) -> int | None:
    """Return the index of the layer that a parameter belongs to; None outside the layers."""
    match = re.match(rf"{re.escape(family.layers)}\.(\d+)\.", name)
    return int(match[1]) if match else None


def _find_dense_name(name: str, family: Family, kept: list[int]) -> str:
    """Return the dense model's name of a weight of the shortened model."""
    layer = _find_layer(name, family)
    return name if layer is None else name.replace(f"{family.layers}.{layer}.", f"{family.layers}.{kept[layer]}.", 1)


def _shorten_windows(dense: Model, documents: Documents) -> dict[str, int]:
    """Return the entries of the config that limit how far attention sees, made shorter than the proof's text."""
    config, short = dense.config(), max(map(len, documents.documents)) // 4 or 1
    windows = {name: getattr(config, name, None) for name in WINDOWS}
    return {name: short for name, window in windows.items() if isinstance(window, int) and window > short}


@contextmanager
def _float32_computation(
    model: Any, family: Family, mixtures: Mapping[int, Mapping[int, float]] | None = None
) -> Iterator[None]:
    """Compute in float32 inside the block, although the weights stay in their own dtype: a layer's are cast while it runs.

    So are those of other layers that it reads: ``mixtures`` has them by layer.
    """
    layers = family.decoder_layers(model)
    parts = {layer: [*layer.parameters()] for layer in layers}
    for at, mixture in (mixtures or {}).items():
        parts[layers[at]] += [each for source in mixture if source != at for each in layers[source].parameters()]
    inner = {module for layer in layers for module in layer.modules()}
    parts |= {module: [*module.parameters(recurse=False)] for module in model.modules() if module not in inner}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    with ExitStack() as stack:
        # A copy of all their rows would be larger than a layer.
        if isinstance(embedding, nn.Embedding):
            del parts[embedding]
            stack.enter_context(replace_forward(embedding, partial(_embed_widened, embedding, embedding.forward)))
        if isinstance(head, nn.Linear):
            del parts[head]
            stack.enter_context(replace_forward(head, partial(_multiply_widened, head)))
        for module, parameters in parts.items():
            if any(each.dtype in HALF for each in parameters):
                stack.enter_context(replace_forward(module, partial(_run_widened, module.forward, parameters)))
        yield


def _embed_widened(module: nn.Embedding, embed: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Return the embedding of some tokens in float32 or wider; only their rows are widened."""
    weight, padding = module.weight, module.padding_idx
    rows, positions = tokens.unique(return_inverse=True)
    own = weight.data
    # It only matters to gradients, and would be no row of these.
    module.padding_idx, weight.data = None, _widen(own[rows])
    try:
        return embed(positions)
    finally:
        module.padding_idx, weight.data = padding, own


def _multiply_widened(module: nn.Linear, states: Tensor) -> Tensor:
    """Return a linear's product in float32 or wider; some rows of its weight are widened at a time."""
    product = torch.cat([states @ _widen(rows).T for rows in module.weight.split(ROWS)], dim=-1)
    return product if module.bias is None else product + _widen(module.bias)


def _widen(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in HALF else weight


def _run_widened(forward: Callable[..., Any], parameters: list[nn.Parameter], *arguments: Any, **options: Any) -> Any:
    """Return what ``forward`` computes with parameters in float32, which are restored after it."""
    # Their values now, since an edit may replace them.
    own = [each.data for each in parameters]
    for each in parameters:
        each.data = each.data.float()
    try:
        return forward(*arguments, **options)
    finally:
        for each, data in zip(parameters, own, strict=True):
            each.data = data


@torch.inference_mode()
def _record_states(
    model: Any,
    family: Family,
    observed: list[int],
    documents: Documents,
    edits: Edits | None,
    given: Mapping[int, Tensor] | None = None,
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the states after the observed layers, (tokens, d) each, and the logits at the last positions of all documents.

    Args:
        model: the model.
        family: describes its parts.
        observed: the layers; ``FIRST`` is the state that enters the first one.
        documents: the text.
        edits: edits to compute unfused.
        given: states that replace the observed ones in the computation of later layers.
    """
    layers, lengths = family.decoder_layers(model), [*map(len, documents.documents)]
    states: dict[int, list[Tensor]] = {layer: [] for layer in observed}
    with ExitStack() as hooks:
        if edits:
            hooks.enter_context(unfused(model, family, edits))
        for layer in observed:
            record = partial(_record_state, states[layer], given[layer].split(lengths) if given else None)
            if layer == FIRST:
                handle = layers[0].register_forward_pre_hook(partial(_replace_input, record), with_kwargs=True)
            else:
                handle = layers[layer].register_forward_hook(partial(_replace_output, record))
            hooks.callback(handle.remove)
        passes = (model(document[None], use_cache=False, logits_to_keep=LOGITS) for document in documents.documents)
        logits = [output.logits[0] for output in passes]
    return {layer: torch.cat(parts) for layer, parts in states.items()}, torch.cat(logits)


def _record_state(states: list[Tensor], given: Sequence[Tensor] | None, state: Tensor) -> Tensor:
    """Append a state (1, tokens, d) to ``states``, and return it or the given one instead."""
    states.append(state[0].clone())
    return state if given is None else given[len(states) - 1].to(state)[None]


def _replace_output(record: Callable[[Tensor], Tensor], _module: nn.Module, _args: Any, output: Any) -> Any:
    return replace_output(output, record(tensor_of(output)))


def _replace_input(record: Callable[[Tensor], Tensor], _module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
    return replace_input(args, options, record(input_of(args, options)))


def _compute_relative_errors(expected: Tensor, actual: Tensor) -> Tensor:
    """Return the relative error of each row, float64, of (rows, entries) tensors."""
    return (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
