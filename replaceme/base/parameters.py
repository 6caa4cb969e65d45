"""All parameters, each defined once: type, range, default and a one-sentence description.

Parameters of a single method are defined in the method's file. Error messages, ``--help`` and docs/parameters.md derive from
these definitions. Names and defaults are those of the published ReplaceMe (arXiv 2505.02819) where it has them, so that a
published config does what its author meant; our own better settings are the preset ``recommended`` (``base/presets.py``).
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode

from replaceme.base.combinations import Methods, Transform, effects_of, own_fields, refusals, without_effect
from replaceme.base.errors import ParameterError, excerpt, shown
from replaceme.base.presets import RECOMMENDED, Preset, preset_of, preset_values
from replaceme.base.progress import logger
from replaceme.base.published import PUBLISHED_KEYS, translate, without_replaced
from replaceme.base.source import Source
from replaceme.base.task import Task, unusable_text

COMMAND_LINE = "command line"
# A config has some 60 lines. Larger input is refused before anything is built from it: aliases of aliases grow without bound.
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 1 << 18, 10_000, 20

Dtype = Literal["bfloat16", "float16", "float32"]
# The bytes of each unit of a size.
UNITS = {"B": 1} | {
    f"{letter}{kind}": base**power for power, letter in enumerate("KMGT", 1) for kind, base in (("B", 1000), ("iB", 1024))
}
# What a parameter with a pattern must be, in words.
PATTERNS = {
    "device": "auto, cpu, cuda or cuda:N",
    "memory": "auto, null, or a size such as 6GB or 500MiB",
    "remove": "null, or a share such as 20% or 20% of layers",
}


class Params(BaseModel):
    """The parameters of one run of the pipeline. Immutable.

    The methods' parameters are extra fields; each method reads its own (``replaceme.base.combinations.Settings``).
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    method: str = Field("lstsq", description="What takes the place of the removed layers, or parts of layers.")

    model_path: str = Field(
        "smollm2-135m-instruct", min_length=1, description="A local model folder, a hub id, or an embedded model's name."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model; null is its main branch.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository ships.")
    use_4bit: bool = Field(
        False, description="Load the calibration model in 4-bit NF4; the fold still uses the original weights."
    )

    dataset: str | tuple[Source, ...] = Field(
        "wikipedia-sample",
        description="Calibration text: a .txt, .jsonl, .csv or .parquet file, a hub id, an embedded text's name, self (text "
        "that the model writes), or a list of these with shares of the tokens: [wikipedia-sample, {notes.jsonl: 2}, self].",
    )
    dataset_config: str | None = Field(None, description="Configuration of a hub dataset, such as sample-10BT.")
    dataset_split: str | None = Field(None, description="Split of the dataset; null is train, or an embedded sample's own.")
    dataset_column: str | None = Field(
        None,
        description="Column with the text or chat; null takes text, or a chat column. For a chat template, today is always "
        "26 July 2024.",
    )
    dataset_revision: str | None = Field(None, description="Branch, tag or commit of a hub dataset.")
    dataset_size: int = Field(128, ge=1, description="Number of calibration documents; selection loss needs 5.")
    max_length: int = Field(1024, ge=2, description="Largest number of tokens of a document.")
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
        "sequential; null puts the whole model on device.",
    )
    threads: int = Field(2, ge=1, le=1024, description="Processor threads; another number gives other last bits.")
    processes: int = Field(
        1, ge=1, le=1024,
        description="Processes that share the passes over the calibration text and healing, each with its own threads and, on "
        "GPUs, a GPU of its own; the result depends on their number only by the order of sums.",
    )  # fmt: skip
    memory: str | None = Field(
        "auto", pattern=r"^(auto|\d+(\.\d+)? ?([KMGT]i?)?B)$",
        description="How much memory the weights may take: a size such as 6GB or 500MiB, or auto (0.7 of what is free on the "
        "device). A larger model is streamed from its files layer by layer, to the same bits; null always loads it whole.",
    )  # fmt: skip

    selection: str | None = Field(
        None,
        description="Which layers are removed: the block with the smallest angular distance, with the smallest residual of a "
        "linear map in its place, or with the smallest next-token loss (of the few with the smallest residuals); or single "
        "layers, by their influence (ShortGPT) or greedily by the loss without them (SLEB). null is the method's own published "
        "criterion.",
    )
    layers_to_skip: int = Field(
        8, ge=1,
        description="Number of layers to remove; methods that remove parts of layers remove as many parameters. With remove, "
        "the largest number.",
    )  # fmt: skip
    remove: str | None = Field(
        None, pattern=r"^\d+(\.\d+)?%( of layers)?$",
        description="How much to remove instead of layers_to_skip layers: a share of all parameters, as 20%, or of those in "
        "decoder layers, as 20% of layers. With transform channels and repair it is met within 1 % of all parameters: at most "
        "layers_to_skip layers go, and MLP channels of every kept layer for the rest. Otherwise the nearest number of layers.",
    )  # fmt: skip
    tolerated_loss: float | None = Field(
        None, gt=0, allow_inf_nan=False,
        description="With selection loss: remove as many layers as possible, at most layers_to_skip, with a rise of the loss "
        "of at most this (nats; the typical rise over the kinds of text, of which a single one may rise more); the loss is "
        "measured with a closed-form fit in the block's place, before any repair. null removes layers_to_skip.",
    )  # fmt: skip
    min_distance_layer: int | None = Field(
        None, ge=1, description="First layer (from 0) that may be removed; with method llm_pruner, that loses parts (null: 4)."
    )
    max_distance_layer: int | None = Field(
        None, ge=2,
        description="The removed block ends before this layer (from 0); with method llm_pruner, so do those that lose "
        "parts (null: the last but one).",
    )  # fmt: skip
    num_A: int = Field(1, ge=1, description="Number of blocks, each with a transform and layers_to_skip layers.")
    merge_consecutive: bool = Field(True, description="Merge adjacent blocks into one; matters for num_A above 1.")

    plain: bool = Field(
        False,
        description="Give the result the family's own form, if the method can, so that it loads without trust_remote_code: "
        "slicegpt with one basis for all layers, llm_pruner with the same widths in every layer, llm_streamline_form mlp with "
        "an attention that adds nothing.",
    )

    transform: Transform = Field(
        "dense",
        description="What replaces the block: a linear map on the host's MLP output (d × d; orthogonal folds where a norm "
        "follows the MLP); refit, new weights of the last linear of the host's MLP; joint, also of its attention's output "
        "projection; or channels, which is joint with the best channels of the host's MLP and of the removed ones.",
    )
    alpha: float = Field(
        0.0, ge=0, allow_inf_nan=False,
        description="Strength of the penalty on the map: the ridge of the least squares, in units of MᵀM (a sum over tokens, "
        "with weights of mean 1 for refit, joint, channels and ghosted_weighted; with method ghosted, M is the whole state); "
        "for loss cosine, in units of that loss summed over tokens.",
    )  # fmt: skip

    refit_ridge: float = Field(
        0.3, gt=0, allow_inf_nan=False,
        description="Ridge of transforms refit and joint toward the folded linear map, of channels toward the channels' own "
        "columns; relative to each feature's sum of squares.",
    )  # fmt: skip
    repair: bool = Field(
        False, description="Re-solve the last linears of each kept layer after the cut, toward the original model's states."
    )
    repair_ridge_attention: float = Field(
        0.3, gt=0, allow_inf_nan=False,
        description="Ridge of the repaired attention output projections, relative to each feature's sum of squares; as that "
        "of the MLP outputs, times the multiple (1 to 64) that does best on held-out documents at the first correction.",
    )  # fmt: skip
    repair_ridge_mlp: float = Field(
        1.0, gt=0, allow_inf_nan=False,
        description="Ridge of the repaired MLP outputs, relative to each feature's sum of squares.",
    )  # fmt: skip
    heal_epochs: int = Field(
        0, ge=0,
        description="Passes over the calibration text that train the last linears of the layers from the cut on, all together, "
        "toward the original model's predictions, with batch_size documents in a step; 0 trains nothing.",
    )  # fmt: skip
    heal_learning_rate: float = Field(
        3e-4, gt=0, allow_inf_nan=False,
        description="AdamW's largest learning rate in healing; larger models need a smaller one.",
    )  # fmt: skip

    tasks: tuple[Task, ...] = Field(
        (Task("wikipedia"), Task("wikipedia_last_word"), Task("wikipedia_continuation")),
        description="Evaluation tasks: embedded ones, tasks and groups of lm-eval (default is the published set), and your own "
        ".txt and .jsonl files; an entry can have options, as in {winogrande: {fewshots: 5, limit: 200}}.",
    )
    eval_tokens: int | None = Field(16384, ge=2, description="Number of tokens of each perplexity task; null scores all.")
    eval_batch_size: int = Field(1, ge=1, description="Full windows (1024 tokens) in one evaluation batch.")
    eval_dtype: Dtype = Field("bfloat16", description="Number format of the evaluation.")

    save_path: str | None = Field(
        None, description="Where a console script puts its result; fixed in the pipeline (artifacts/model)."
    )
    save_transform_only: bool = Field(False, description="Console scripts: save the transform and write no model.")

    @field_validator("*")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        if isinstance(value, str) and (wanted := unusable_text(value)):
            raise PydanticCustomError("unusable_text", "{wanted}", {"wanted": wanted})
        return value


def read_params(
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    methods: Methods | None = None,
    preset: Preset | None = "published",
) -> Params:
    """Read and validate a YAML 1.2 file of parameters.

    Args:
        path: the file; None takes the preset's values.
        overrides: values from the command line, which override the file's.
        methods: the methods that ``method`` may name. Their parameters are checked and get their defaults, and unknown keys are
            refused. None skips this, for stages that use no method: the first stage has checked everything.
        preset: the values of parameters that neither names, unless the key ``preset`` says it: the published ones, which are
            the defaults of ``Params``; the recommended ones; or, with None, those that suit the file (``preset_of``).

    Raises:
        ParameterError: lists all problems.
    """
    raw, problems = _read_yaml(path) if path else ({}, [])
    overrides = dict(overrides or {})
    chosen, why = preset_of(raw, overrides, preset, _place(path) if path else "no file")
    raw, overrides = ({key: value for key, value in given.items() if key != "preset"} for given in (raw, overrides))
    raw = without_replaced(raw, overrides)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    base = preset_values(chosen, overrides.get("method", raw.get("method", Params.model_fields["method"].default)))
    if methods is not None and not raw.keys() | overrides.keys() >= RECOMMENDED.keys():
        logger.info("preset %s (%s)", chosen, why)
    for origin, given in ((f"preset {chosen}", base), (_place(path), raw), (COMMAND_LINE, overrides)):
        translated, notes, refused = translate(given)
        values |= translated
        origins |= {excerpt(key): origin for key in translated}
        problems += [f"{origin}: {problem}" for problem in refused]
        for note in notes:
            logger.info("%s: %s", origin, note)
    found: list[str] = []
    params = _validated(Params, values, found)
    if methods is not None:
        for method in methods.values():
            if own := _validated(method.settings, values, found):
                values |= own.model_dump()
        found += _unknown_keys(values, methods) + _unknown_selection(values, methods) + _unknown_method(values, methods)
        if params and not found:
            params = Params.model_validate(values)
            everything = params.model_dump()
            found = refusals(everything, methods[params.method])
            defaults = {name: info.default for name, info in fields_of(methods).items()}
            stated = {key: origin for key, origin in origins.items() if origin != f"preset {chosen}"}
            for sentence in without_effect(stated, everything, defaults, effects_of(methods)):
                logger.info(sentence)
    for problem in found:
        problems.append(f"{origins.get(problem.split(':')[0], COMMAND_LINE)}: {problem}")
    if problems or params is None:
        raise ParameterError(list(dict.fromkeys(problems)))
    return params


def fields_of(methods: Methods) -> dict[str, FieldInfo]:
    """Return all parameters by name, with those of the methods, in documented order."""
    return {**Params.model_fields, **own_fields(methods)}


def parse_value(text: str) -> Any:
    """Parse one command-line value as YAML 1.2 (``1e-6`` is a number, ``no`` a string)."""
    try:
        return _loaded(YAML(typ="safe", pure=True), text)
    except ValueError:
        return text


def nearest(name: str, names: Iterable[str], count: int = 1) -> str:
    """Return `` (did you mean X?)`` with at most ``count`` similar names, or an empty string."""
    close = difflib.get_close_matches(name[:200], list(names), n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _place(path: Path | None) -> str:
    return excerpt(path, 150)


def _read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    place = _place(path)
    try:
        # A pipe or a device could be read for ever.
        if path.exists() and not path.is_file():
            raise ParameterError(f"{place}: is no regular file; give the path of a YAML file of parameters.")
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode()
    except FileNotFoundError:
        raise ParameterError(f"{place}: there is no such file; give the path of a YAML file of parameters.") from None
    except UnicodeDecodeError as problem:
        raise ParameterError(f"{place}: can't be read as UTF-8 text (byte {problem.start}).") from None
    except OSError as problem:
        raise ParameterError(f"{place}: can't be read ({problem.strerror}).") from None
    if len(raw) > MAX_BYTES:
        raise ParameterError(f"{place}: is larger than {MAX_BYTES >> 10} KiB; give a YAML file of parameters.")
    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = True
    try:
        content = _loaded(yaml, text)
        problems = _duplicates(yaml, text, place)
    except ValueError as invalid:
        raise ParameterError(f"{place}: {invalid}.") from None
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ParameterError(f"{place}: must hold one `key: value` a line, not {type(content).__name__}.")
    # Half a surrogate pair has no UTF-8 form; pydantic fails on it without naming a key.
    if broken := [key for key in content if key.encode("utf-8", "ignore").decode() != key]:
        raise ParameterError(f"{place}: a key is no readable text ({excerpt(broken[0])}); docs/parameters.md lists the keys.")
    return content, problems


def _loaded(yaml: YAML, text: str) -> Any:
    """Return the content of a YAML text. Raises ValueError, with what is wrong, if it is invalid or too large."""
    try:
        if too_large := _too_large(yaml, text):
            raise OverflowError(too_large)
        return yaml.load(text)
    except OverflowError as problem:
        raise ValueError(str(problem)) from None
    except Exception as invalid:  # besides YAMLError whatever a converter raises, for an impossible date or a wrong tag
        raise ValueError(f"isn't valid YAML: {excerpt(invalid, 200)}") from None


def _too_large(yaml: YAML, text: str) -> str | None:
    """Tell what exceeds the limits, by the parser's events: an alias counts as many values as what it stands for."""
    values, known = 0, dict[str, int]()
    still_open: list[tuple[str | None, int]] = []
    for event in yaml.parse(text):
        if isinstance(event, AliasEvent):
            if event.anchor not in known:
                return f"has the alias *{excerpt(event.anchor)} without a complete value before it"
            values += known[event.anchor]
        elif isinstance(event, CollectionStartEvent):
            still_open.append((event.anchor, values))
            values += 1
        elif isinstance(event, NodeEvent):
            values += 1
            known |= {event.anchor: 1} if event.anchor else {}
        elif isinstance(event, CollectionEndEvent):
            anchor, before = still_open.pop()
            known |= {anchor: values - before} if anchor else {}
        if len(still_open) > MAX_DEPTH:
            return f"nests more than {MAX_DEPTH} lists and mappings in each other; write one `key: value` a line"
        if values > MAX_VALUES:
            return f"has more than {MAX_VALUES} values, aliases included; write one `key: value` a line"
    return None


def _duplicates(yaml: YAML, text: str, place: str) -> list[str]:
    """Return the keys given twice with different values, as problems; equal values are only warned of.

    The published cosine file has a key twice.
    """
    root = yaml.compose(text)
    if not isinstance(root, MappingNode):
        return []
    seen: dict[str, str] = {}
    problems = []
    for key_node, value_node in root.value:
        key, value = str(key_node.value), text[value_node.start_mark.index : value_node.end_mark.index].strip()
        if key in seen and parse_value(seen[key]) != parse_value(value):
            name, first, second = map(excerpt, (key, seen[key], value))
            problems.append(f"{place}: {name}: is given twice, as {first} and as {second}; keep one.")
        elif key in seen:
            logger.warning("%s: %s is given twice with the same value.", place, excerpt(key))
        seen.setdefault(key, value)
    return problems


Model = TypeVar("Model", bound=BaseModel)


def _validated(model: type[Model], values: Mapping[str, Any], found: list[str]) -> Model | None:
    """Return the validated parameters; or None, after adding a sentence for each problem to ``found``."""
    try:
        return model.model_validate(values)
    except ValidationError as invalid:
        found += [_sentence(problem) for problem in invalid.errors()]
    return None


def _sentence(problem: ErrorDetails) -> str:
    """Return a pydantic error as one sentence: the key, what is wrong, what would be right."""
    key, kind, given = str(problem["loc"][0]), problem["type"], problem["input"]
    limits = problem.get("ctx", {})
    wanted = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": PATTERNS.get(key, "a text"),
        "string_too_short": "a text that isn't empty",
        "string_pattern_mismatch": PATTERNS.get(key, ""),
        "greater_than": f"above {limits.get('gt', 0):g}",
        "greater_than_equal": f"at least {limits.get('ge', 0):g}",
        "less_than_equal": f"at most {limits.get('le', 0):g}",
        "literal_error": str(limits.get("expected")),
    }.get(kind, problem["msg"])
    return f"{key}: must be {wanted}, not {'null' if given is None else shown(given)}."


def size_of(text: str) -> int:
    """Return the bytes of a size such as 6GB, 500 MiB or 1.5GiB."""
    number = text.rstrip("BKMGTi")
    return int(float(number) * UNITS[text.removeprefix(number)])


def _unknown_keys(values: Mapping[str, Any], methods: Methods) -> list[str]:
    known = fields_of(methods)
    return [
        f"{excerpt(key)}: is not a parameter{nearest(key, [*known, *PUBLISHED_KEYS])}; docs/parameters.md lists them."
        for key in values
        if key not in known
    ]


def _unknown_selection(values: Mapping[str, Any], methods: Methods) -> list[str]:
    known = list(dict.fromkeys(name for method in methods.values() for name in method.selections))
    selection = values.get("selection")
    if not isinstance(selection, str) or selection in known:
        return []
    name, hint = excerpt(selection), nearest(selection, known)
    return [f"selection: '{name}' is not a criterion{hint}; use null or one of {', '.join(known)}."]


def _unknown_method(values: Mapping[str, Any], methods: Methods) -> list[str]:
    method = values.get("method", "lstsq")
    if not isinstance(method, str) or method in methods:
        return []
    known = sorted(methods)
    return [f"method: '{excerpt(method)}' is not a method{nearest(method, known)}; use one of {', '.join(known)}."]
