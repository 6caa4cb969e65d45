"""Every parameter, defined once: type, range, default and a sentence of meaning.

Error texts, ``--help`` and docs/parameters.md come from here. The defaults are the published behaviour of ReplaceMe
(arXiv 2505.02819), so that a published config does what its author meant; our own better settings stand openly in the
repository's params.yaml. The names are the published ones where such a name exists.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode

from replaceme.base.combinations import Limits, refusals, without_effect
from replaceme.base.errors import ParameterError
from replaceme.base.progress import logger
from replaceme.base.published_keys import PUBLISHED_KEYS, translate, without_replaced
from replaceme.base.task import Task

COMMAND_LINE = "command line"

Dtype = Literal["bfloat16", "float16", "float32"]


class Params(BaseModel):
    """One setting of the whole pipeline. Immutable; unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    method: str = Field(
        "lstsq",
        description="What takes the place of what goes. ReplaceMe: lstsq and cosine (a linear map, in closed form or by an "
        "iterative solver). To compare with: uidl, shortgpt, sleb (nothing), laco (merged weights), prune_and_comp (a scale), "
        "linearpatch and ghosted (a map of the whole state), llm_streamline (a trained layer); and, where parts of layers go, "
        "slicegpt (width of the residual stream) and llm_pruner (heads and channels).",
    )

    model_path: str = Field(
        "smollm2-135m-instruct", min_length=1, description="A local model folder, a hub id, or an embedded model's name."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; null is its main branch.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository ships.")
    use_4bit: bool = Field(
        False, description="Load the calibration model in 4-bit NF4; the fold still uses the original weights."
    )

    dataset: str = Field(
        "wikipedia-sample",
        min_length=1,
        description="Calibration text: a .txt, .jsonl, .csv or .parquet file, a hub id, or an embedded sample's name.",
    )
    dataset_config: str | None = Field(None, description="Configuration of a hub dataset, such as sample-10BT.")
    dataset_split: str | None = Field(None, description="Split of the dataset; null is train, or an embedded sample's own.")
    dataset_column: str | None = Field(None, description="Column with the text or chat; null takes text, or a chat column.")
    dataset_revision: str | None = Field(None, description="Branch, tag or commit of a hub dataset.")
    dataset_size: int = Field(128, ge=1, description="Number of calibration documents.")
    max_length: int = Field(1024, ge=2, description="Tokens of a document at most.")
    pack: bool = Field(False, description="Join short rows until a document is full.")
    seed: int = Field(42, ge=0, le=2**32 - 1, description="Seed of the shuffle that picks the documents.")

    batch_size: int = Field(8, ge=1, description="Documents in one calibration batch.")
    dtype: Dtype = Field(
        "bfloat16",
        description="Number format of the calibration passes; sums and solves are float64, single tokens on disk bf16.",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        None,
        description="How accelerate spreads a model that is too large for one GPU: auto, balanced, balanced_low_0 or "
        "sequential; null puts all of it on device.",
    )
    threads: int = Field(2, ge=1, le=1024, description="Processor threads; another number gives other last bits.")

    selection: Literal["angular", "residual", "loss", "influence", "greedy"] | None = Field(
        None,
        description="What goes: the block with the smallest angular distance, residual of a linear map in its place, or "
        "next-token loss (of the few with the smallest residuals); or single layers, by their influence (ShortGPT) or greedily "
        "by the loss without them (SLEB). null is the method's own published criterion.",
    )
    layers_to_skip: int = Field(
        8, ge=1, description="Number of layers to remove; where parts of layers go, as many parameters as these layers have."
    )
    tolerated_loss: float | None = Field(
        None, gt=0, allow_inf_nan=False,
        description="With selection loss: layers_to_skip is the most that may go, and as many go as raise that loss, which is "
        "measured with a closed-form fit in the block's place and before any repair, by so many nats at most; null removes "
        "layers_to_skip.",
    )  # fmt: skip
    min_distance_layer: int | None = Field(
        None, ge=1, description="First layer (from 0) that may be removed; that loses parts, with method llm_pruner (null: 4)."
    )
    max_distance_layer: int | None = Field(
        None, ge=2,
        description="The removed block ends before this layer (from 0); or the layers that lose parts, with method llm_pruner "
        "(null: the last but one).",
    )  # fmt: skip
    num_A: int = Field(1, ge=1, description="Number of blocks, each with a transform and layers_to_skip layers.")
    merge_consecutive: bool = Field(True, description="Merge adjacent blocks into one; matters for num_A above 1.")

    laco_layers: int = Field(7, ge=2, description="Method laco: layers that become one in a merge, at most (published as C).")
    laco_interval: int = Field(
        1, ge=1, description="Method laco: how many layers in front of a merge the next one is tried (published as I)."
    )
    laco_threshold: float = Field(
        0.45, ge=-1, le=1,
        description="Method laco: cosine of last states with the original model's that a merge must leave (published as T); "
        "lowered by steps of 0.01 until layers_to_skip layers go, so that 1 finds the highest one.",
    )  # fmt: skip

    linearpatch_form: Literal["hadamard", "diagonal"] = Field(
        "hadamard",
        description="Method linearpatch: whether channels are scaled in coordinates turned by a Hadamard matrix (published as "
        "rotate; d × d parameters), or in the model's own (diagonal, published as diag; d).",
    )
    ghosted_weighted: bool = Field(
        False,
        description="Method ghosted: every token counts by its relative error (weights 1/‖H‖²); false is the published form.",
    )

    llm_streamline_form: Literal["layer", "mlp"] = Field(
        "layer",
        description="Method llm_streamline: what is trained in the layers' place: the whole layer in front of them, or its MLP "
        "alone, without an attention.",
    )
    llm_streamline_learning_rate: float = Field(
        2e-4, gt=0, allow_inf_nan=False, description="Method llm_streamline: AdamW's largest step."
    )
    llm_streamline_epochs: int = Field(
        1, ge=1, description="Method llm_streamline: passes over the documents, batch_size of them in a step."
    )
    plain: bool = Field(
        False,
        description="Give the result the family's own form, where the method can, so that it loads without trust_remote_code: "
        "slicegpt by one basis for all layers, llm_pruner by as much from every layer, llm_streamline_form mlp by an attention "
        "that stays and adds nothing.",
    )

    transform: Literal["dense", "diagonal", "two_vectors", "triangular", "orthogonal", "refit", "joint", "channels"] = Field(
        "dense",
        description="What takes the block's place: a linear map on the host's MLP output (d × d), orthogonal folding where "
        "a norm follows the MLP; or refit, which solves for all weights of the linear that ends the host's MLP, or joint, for "
        "those of its attention's output projection too; or channels: joint, with the best channels of the host's MLP and of "
        "those that go.",
    )
    alpha: float = Field(
        0.0, ge=0, allow_inf_nan=False,
        description="Strength of the penalty on the map: the ridge of the least squares, in units of MᵀM (a sum over tokens, "
        "of refit, joint, channels and ghosted_weighted with weights of mean 1; with method ghosted, M is the whole state); "
        "for loss cosine in units of that loss, summed over tokens.",
    )  # fmt: skip
    loss: Literal["cosine", "mse", "elastic_net"] = Field(
        "cosine",
        description="What method cosine minimises: 1 − cosine, the squared error, or that with an L1 penalty on the map.",
    )
    accurate: bool = Field(
        False,
        description="Loss cosine compares M T + Z with H; false compares M T with H − Z, which takes two thirds of the disk.",
    )
    l1_ratio: float = Field(
        0.5, ge=0, le=1, description="Loss elastic_net: the L1 penalty's share of alpha; the rest is half a ridge."
    )
    solver: Literal["adam", "lbfgs", "cg", "trust_region"] = Field(
        "adam", description="Iterative solver of method cosine: Adam by minibatches, or one of scipy's on all tokens."
    )
    start: Literal["closed_form", "identity"] = Field(
        "closed_form", description="Where method cosine starts: the least-squares map, or the identity (the published preset)."
    )
    learning_rate: float = Field(1e-4, gt=0, allow_inf_nan=False, description="Solver adam: its step.")
    epochs: int = Field(10, ge=1, description="Solver adam: passes over the tokens at most.")
    tokens_per_step: int = Field(1024, ge=1, description="Solver adam: tokens of a minibatch.")
    max_iterations: int = Field(500, ge=1, description="Solvers lbfgs, cg and trust_region: iterations at most.")

    refit_ridge: float = Field(
        0.3, gt=0, allow_inf_nan=False,
        description="Ridge of transform refit and joint toward the linear map's fold, of channels toward their own columns, "
        "relative to each feature's own squares.",
    )  # fmt: skip
    repair: bool = Field(
        False, description="Re-solve the last linears of each kept layer behind the cut, toward the original model's states."
    )
    repair_ridge_attention: float = Field(
        0.3, gt=0, allow_inf_nan=False,
        description="Ridge of the repaired attention output projections, relative to each feature's own squares.",
    )  # fmt: skip
    repair_ridge_mlp: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="Ridge of the repaired MLP outputs, relative to each feature's own squares."
    )  # fmt: skip
    heal_epochs: int = Field(
        0, ge=0,
        description="Passes over the calibration text in which the last linears of the layers from the cut on are trained, all "
        "together, toward the original model's predictions, batch_size documents in a step; 0 trains nothing.",
    )  # fmt: skip
    heal_learning_rate: float = Field(
        3e-4, gt=0, allow_inf_nan=False, description="AdamW's largest step while healing; the larger the model, the smaller."
    )

    tasks: tuple[Task, ...] = Field(
        (Task("wikipedia"), Task("wikipedia_last_word"), Task("wikipedia_continuation")),
        description="What is scored: embedded tasks, tasks and groups of lm-eval (default is the published set), and your own "
        ".txt and .jsonl files; an entry can have options, as in {winogrande: {fewshots: 5, limit: 200}}.",
    )
    eval_tokens: int | None = Field(16384, ge=2, description="Tokens of each perplexity task; null scores all.")
    eval_batch_size: int = Field(1, ge=1, description="Full windows (1024 tokens) in one evaluation batch.")
    eval_dtype: Dtype = Field("bfloat16", description="Number format of the evaluation.")

    save_path: str | None = Field(
        None, description="Where a console script puts its result; fixed in the pipeline (artifacts/model)."
    )
    save_transform_only: bool = Field(False, description="Console scripts: save the transform and write no model.")


def read_params(
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    methods: Mapping[str, Limits] | None = None,
) -> Params:
    """Read and validate a YAML 1.2 file of parameters.

    Args:
        path: the file; None takes the defaults.
        overrides: values that win over the file's, as the command line gives them.
        methods: the methods that ``method`` may name; None leaves it unchecked (stages that don't use it).

    Raises:
        ParameterError: naming every problem at once.
    """
    raw, problems = _read_yaml(path) if path else ({}, [])
    raw = without_replaced(raw, overrides or {})
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, given in ((str(path), raw), (COMMAND_LINE, overrides or {})):
        translated, notes, refused = translate(given)
        values |= translated
        origins |= dict.fromkeys(translated, origin)
        problems += [f"{origin}: {problem}" for problem in refused]
        for note in notes:
            logger.info("%s: %s", origin, note)
    params = None
    found = []
    try:
        params = Params.model_validate(values)
    except ValidationError as invalid:
        found = [_sentence(problem) for problem in invalid.errors()]
    if params:
        if methods and params.method in methods:
            found += refusals(params.model_dump(), methods[params.method])
        for sentence in without_effect(values, params.model_dump(), Params().model_dump()):
            logger.info(sentence)
    for problem in found + _unknown_method(values, methods):
        problems.append(f"{origins.get(problem.split(':')[0], COMMAND_LINE)}: {problem}")
    if problems or params is None:
        raise ParameterError(list(dict.fromkeys(problems)))
    return params


def parse_value(text: str) -> Any:
    """Read one command-line value as YAML 1.2 would (``1e-6`` is a number, ``no`` a string)."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError):  # ValueError: an impossible date
        return text


def nearest(name: str, names: Iterable[str], count: int = 1) -> str:
    """Return `` (did you mean X?)`` for the ``count`` most similar names at most, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ParameterError(f"{path}: there is no such file; give the path of a YAML file of parameters.") from None
    except (OSError, UnicodeDecodeError) as unreadable:
        raise ParameterError(f"{path}: can't be read as UTF-8 text ({unreadable}).") from None
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True
    try:
        problems = _duplicates(yaml, text, path)
        content = yaml.load(text)
    except (YAMLError, ValueError) as invalid:  # ValueError: an impossible date
        reason = " ".join(str(invalid).split())
        raise ParameterError(f"{path}: isn't valid YAML: {reason}.") from None
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ParameterError(f"{path}: must hold one `key: value` a line, not {type(content).__name__}.")
    return content, problems


def _duplicates(yaml: YAML, text: str, path: Path) -> list[str]:
    """Equal values of a repeated key are a warning, different ones a problem (the published cosine file has one)."""
    root = yaml.compose(text)
    if not isinstance(root, MappingNode):
        return []
    seen: dict[str, str] = {}
    problems = []
    for key_node, value_node in root.value:
        key, value = str(key_node.value), text[value_node.start_mark.index : value_node.end_mark.index].strip()
        if key in seen and parse_value(seen[key]) != parse_value(value):
            problems.append(f"{path}: {key}: is given twice, as {seen[key]} and as {value}; keep one.")
        elif key in seen:
            logger.warning("%s: %s is given twice with the same value.", path, key)
        seen.setdefault(key, value)
    return problems


def _sentence(problem: ErrorDetails) -> str:
    """Say a pydantic error in one sentence: the key, what is wrong, what would be right."""
    key, kind, given = str(problem["loc"][0]), problem["type"], problem["input"]
    limits = problem.get("ctx", {})
    if kind == "extra_forbidden":
        hint = nearest(key, [*Params.model_fields, *PUBLISHED_KEYS])
        return f"{key}: is not a parameter{hint}; docs/parameters.md lists them."
    wanted = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "a text",
        "string_too_short": "a text that isn't empty",
        "string_pattern_mismatch": "auto, cpu, cuda or cuda:N",
        "greater_than": f"above {limits.get('gt', 0):g}",
        "greater_than_equal": f"at least {limits.get('ge', 0):g}",
        "less_than_equal": f"at most {limits.get('le', 0):g}",
        "literal_error": str(limits.get("expected")),
    }.get(kind, problem["msg"])
    shown = "null" if given is None else repr(given)
    return f"{key}: must be {wanted}, not {shown}."


def _unknown_method(raw: Mapping[str, Any], methods: Iterable[str] | None) -> list[str]:
    method = raw.get("method", "lstsq")
    if methods is None or not isinstance(method, str) or method in set(methods):
        return []
    known = sorted(methods)
    return [f"method: '{method}' is not a method{nearest(method, known)}; use one of {', '.join(known)}."]


def reference() -> str:
    """Return docs/parameters.md: one table row a parameter, made from the definitions above."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in Params.model_fields.items():
        default = (
            "null"
            if field.default is None
            else str(field.default).lower()
            if isinstance(field.default, bool)
            else field.default
        )
        if isinstance(default, tuple):
            default = ", ".join(task.name for task in default)
        rows.append(f"| `{name}` | {default} | {field.description} |")
    published = ", ".join(f"`{key}`" for key in PUBLISHED_KEYS)
    return (
        "# Parameters\n\n"
        "Made from `replaceme/base/params.py` by `python -m replaceme.base.params`. The defaults are the published behaviour; "
        "the repository's `params.yaml` states other values where we found better ones.\n\n"
        + "\n".join(rows)
        + f"\n\nThe published program's other keys are accepted too, and mapped or reported as ignored: {published}.\n"
    )


if __name__ == "__main__":
    print(reference(), end="")
