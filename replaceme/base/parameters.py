"""The parameters: one model of their names, types, ranges, defaults and sentences, and how a config file fills it.

``--help``, docs/parameters.md and the error messages come from the fields below. One with a ``title`` is common: it stands in
the short help. Parameters of a single method are fields of a model in that method's file. Names and defaults are those of the
published ReplaceMe (arXiv 2505.02819) where it has them, so that a published config does what its author meant; our better
settings are the preset ``recommended`` (``replaceme.base.published``).
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from replaceme.base.combinations import Methods, Transform, describe_users, has_effect, refusals, users_of
from replaceme.base.config import read_config
from replaceme.base.entries import Dataset, Source, Task, Tasks, TokenCount
from replaceme.base.errors import ParameterError, quote
from replaceme.base.progress import logger
from replaceme.base.published import PUBLISHED_KEYS, RECOMMENDED, Preset, choose_preset, drop_replaced, preset_values, translate

COMMAND_LINE = "command line"

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
# What a value must be, by pydantic's kind of error; and by the name of a parameter or option that says more.
KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a text",
    "string_too_short": "a text that isn't empty",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
}
WORDS = {
    "device": "auto, cpu, cuda, mps, xpu, or one GPU as cuda:N",
    "memory": "auto, null, or a size such as 6GB or 500MiB",
    "remove": "null, or a share such as 20% or 20% of layers",
    "dataset": "a name, or a list of names with shares",
    "heal_dataset": "null, a name, or a list of names with shares",
    "heal_tokens": "a number of tokens, such as 250000, 250k or 1M",
    "tasks": "a list of task names",
    "choices": "the name of a column or a list of such names",
}


class Params(BaseModel):
    """The parameters of one run of the pipeline. Immutable.

    The methods' parameters are extra fields; each method reads its own (``replaceme.base.combinations.Settings``).
    """

    model_config = ConfigDict(
        extra="allow", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    method: str = Field("lstsq", title="what takes the place of the removed layers, or parts of layers")
    """What takes the place of the removed layers, or parts of layers."""

    model_path: str = Field("smollm2-135m-instruct", min_length=1, title="hub id, local folder or embedded model")
    """A local model folder, a hub id, or an embedded model's name."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null is its main branch."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships."""
    use_4bit: bool = False
    """Load the calibration model in 4-bit NF4; the fold still uses the original weights."""

    dataset: Dataset = Field(
        "wikipedia-sample", title="text file, hub id, embedded text, self (the model writes it), or [a, {b: share}]"
    )
    """Calibration text: a .txt, .jsonl, .csv or .parquet file, a hub id, an embedded text's name, self (text that the model
    writes), or a list of these with shares of the tokens: [wikipedia-sample, {notes.jsonl: 2}, self]."""
    dataset_config: str | None = None
    """Configuration of a hub dataset, such as sample-10BT."""
    dataset_split: str | None = None
    """Split of the dataset; null is train, or an embedded sample's own."""
    dataset_column: str | None = None
    """Column with the text or chat; null takes text, or a chat column. For a chat template, today is always 26 July 2024."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    dataset_size: int = Field(128, ge=1, title="documents")
    """Number of calibration documents; selection loss needs 5."""
    max_length: int = Field(1024, ge=2)
    """Largest number of tokens of a document."""
    pack: bool = False
    """Join short rows until a document is full; the documents of a running text (a .txt) are always full."""
    seed: int = Field(42, ge=0, le=2**32 - 1)
    """Seed of the shuffle that picks the documents."""

    batch_size: int = Field(8, ge=1)
    """Documents in one calibration batch."""
    dtype: Dtype = "bfloat16"
    """Number format of the calibration passes; sums and solves are float64, single tokens on disk bf16. auto is the
    format in which a processor computes the model's products fastest, float32 or bfloat16, measured once; bfloat16 where memory
    asks for it, and on a GPU."""
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|(cuda|mps|xpu|npu|hpu|mtia)(:\d+)?)$",
        title="auto, cpu, cuda, mps, xpu, or one GPU as cuda:N",
    )
    """auto (the GPU, if there is one), cpu, cuda (NVIDIA, and AMD by ROCm), mps (Apple), xpu (Intel), or one GPU as cuda:N."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """How accelerate spreads a model that is too large for one GPU: auto, balanced, balanced_low_0 or sequential; null puts the
    whole model on device."""
    threads: int = Field(2, ge=1, le=1024)
    """Processor threads; another number gives other last bits."""
    processes: int = Field(1, ge=1, le=1024)
    """Processes that share the passes over the calibration text and healing, each with its own threads and, on GPUs, a GPU of
    its own; the result depends on their number only by the order of sums."""
    memory: str | None = Field(
        "auto",
        pattern=r"^(auto|\d+(\.\d+)? ?([KMGT]i?)?B)$",
        title="of the weights: auto, or a size as 6GB (a larger model is streamed)",
    )
    """How much memory the weights may take: a size such as 6GB or 500MiB, or auto (0.7 of what is free on the device). A larger
    model is streamed from its files layer by layer, to the same bits; null always loads it whole."""

    selection: str | None = Field(None, title="what the cut minimises; null: the method's own criterion")
    """Which layers are removed: the block with the smallest angular distance, with the smallest residual of a linear map in its
    place, or with the smallest next-token loss (of the few with the smallest residuals); or single layers, by their
    influence (ShortGPT) or greedily by the loss without them (SLEB). null is the method's own published criterion."""
    layers_to_skip: int = Field(8, ge=1, title="layers to remove")
    """Number of layers to remove; methods that remove parts of layers remove as many parameters. With remove, the largest
    number. The commands and the Python interface take 13 % of the layers where nothing names it."""
    remove: str | None = Field(None, pattern=r"^\d+(\.\d+)?%( of layers)?$", title="a share instead, as 20% or '20% of layers'")
    """How much to remove instead of layers_to_skip layers: a share of all parameters, as 20%, or of those in decoder layers, as
    20% of layers. With transform channels and repair it is met within 1 % of all parameters: at most layers_to_skip layers
    go, and MLP channels of every kept layer for the rest. Otherwise the nearest number of layers."""
    tolerated_loss: float | None = Field(None, gt=0, title="remove as many layers as raise the loss by no more, in nats")
    """With selection loss: remove as many layers as possible, at most layers_to_skip, with a rise of the loss of at most this
    (nats; the typical rise over the kinds of text, of which a single one may rise more); the loss is measured with a
    closed-form fit in the block's place, before any repair. null removes layers_to_skip."""
    min_distance_layer: int | None = Field(None, ge=1)
    """First layer (from 0) that may be removed; with method llm_pruner, that loses parts (null: 4)."""
    max_distance_layer: int | None = Field(None, ge=2)
    """The removed block ends before this layer (from 0); with method llm_pruner, so do those that lose parts (null: the last
    but one)."""
    num_A: int = Field(1, ge=1)
    """Number of blocks, each with a transform and layers_to_skip layers."""
    merge_consecutive: bool = True
    """Merge adjacent blocks into one; matters for num_A above 1."""

    plain: bool = False
    """Give the result the family's own form, if the method can, so that it loads without trust_remote_code: slicegpt with one
    basis for all layers, llm_pruner with the same widths in every layer, llm_streamline_form mlp with an attention that adds
    nothing."""

    transform: Transform = Field("dense", title="a map's shape, or new weights of the layer before the cut")
    """What replaces the block: a linear map on the MLP output of the layer before it (d × d; orthogonal folds where a norm
    follows the MLP); refit, new weights of the last linear of that MLP; joint, also of its attention's output projection; or
    channels, which is joint with the best channels of that MLP and of the removed ones."""
    alpha: float = Field(0.0, ge=0, title="ridge of a map, in units of MᵀM")
    """Strength of the penalty on the map: the ridge of the least squares, in units of MᵀM (a sum over tokens, with weights of
    mean 1 for refit, joint, channels and ghosted_weighted; with method ghosted, M is the whole state); for loss cosine, in
    units of that loss summed over tokens."""
    refit_ridge: float = Field(0.3, gt=0)
    """Ridge of transforms refit and joint toward the folded linear map, of channels toward the channels' own columns; relative
    to each feature's sum of squares."""

    repair: bool = Field(False, title="re-solve the kept layers after the cut")
    """Re-solve the last linears of each kept layer after the cut, toward the original model's states."""
    repair_ridge_attention: float = Field(0.3, gt=0)
    """Ridge of the repaired attention output projections, relative to each feature's sum of squares; as that of the MLP
    outputs, times the multiple (1 to 64) that does best on held-out documents at the first correction."""
    repair_ridge_mlp: float = Field(1.0, gt=0)
    """Ridge of the repaired MLP outputs, relative to each feature's sum of squares."""
    heal_tokens: TokenCount = Field(0, ge=0, title="tokens to train on afterwards, as 250k; 0: none")
    """Tokens of text on which the shortened model is trained toward the original model's predictions (healing), as 250000, 250k
    or 1M; 0 trains nothing."""
    heal_dataset: Dataset | None = None
    """Text of the healing, as dataset, self included; null takes other documents of the calibration's, without self."""
    heal_weights: Literal["all", "after_cut", "outputs", "lora"] = "all"
    """What healing trains: all weights of the kept layers and the last norm; those of the layers from the cut on; only the last
    linears of their attention and MLP; or changes of low rank of all linears of the kept layers, which are folded in at the end
    (less memory)."""
    heal_learning_rate: float = Field(1e-4, gt=0)
    """Largest learning rate in healing; larger models need a smaller one, lora a larger one."""
    heal_tokens_per_step: int = Field(4096, ge=1)
    """Tokens of a step of the healing; batch_size documents at a time are computed."""
    heal_rank: int = Field(16, ge=1)
    """Rank of the changes that lora trains."""
    heal_optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer of healing: AdamW, or Muon for the matrices of linears, whose updates are orthogonalized; not for lora."""
    keep_if_better: bool = False
    """Compare the result with the removal of one block of as many layers with nothing in its place, at its best cut, on text
    that the dense model writes. If that is nearer to the dense model by more than a standard error, it is exported instead of
    weights that repair, healing or the transforms refit, joint and channels made; a published map is kept."""

    tasks: Tasks = Field(
        (Task("wikipedia"), Task("wikipedia_last_word"), Task("wikipedia_continuation")),
        title="embedded texts, lm-eval tasks, your files: a,b,c",
    )
    """Evaluation tasks: embedded ones, tasks and groups of lm-eval (default is the published set), and your own .txt and .jsonl
    files; an entry can have options, as in {winogrande: {fewshots: 5, limit: 200}}."""
    eval_tokens: int | None = Field(16384, ge=2, title="tokens of each perplexity task")
    """Number of tokens of each perplexity task; null scores all."""
    eval_batch_size: int = Field(1, ge=1)
    """Full windows (1024 tokens) in one evaluation batch."""
    eval_dtype: Dtype = "bfloat16"
    """Number format of the evaluation; auto as of dtype."""

    save_path: str | None = Field(None, title="its folder; intermediate results lie beside it, in FOLDER.work")
    """Where a console script puts its result; fixed in the pipeline (artifacts/model)."""
    save_transform_only: bool = False
    """Console scripts: save the transform and write no model."""


def size_of(text: str) -> int:
    """Return the bytes of a size such as 6GB, 500 MiB or 1.5GiB."""
    number = text.rstrip("BKMGTi")
    unit = text.removeprefix(number).removesuffix("B")
    return int(float(number) * (1024 if unit.endswith("i") else 1000) ** " KMGT".index(unit[:1] or " "))


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
            the defaults of ``Params``; the recommended ones; or, with None, those that suit the file (``choose_preset``).

    Raises:
        ParameterError: lists all problems, each with its origin: the file, or the command line.
    """
    file, problems = read_config(path) if path else ({}, [])
    given = dict(overrides or {})
    file_name = str(path or "no file")
    chosen, why = choose_preset(file, given, preset, file_name)
    named = {**file, **given}
    base = preset_values(chosen, named.get("method", Params.model_fields["method"].default), named)
    if methods is not None and not file.keys() | given.keys() >= RECOMMENDED.keys():
        logger.info("preset %s (%s)", chosen, why)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in ((f"preset {chosen}", base), (file_name, drop_replaced(file, given)), (COMMAND_LINE, given)):
        translated, notes, refused = translate({key: value for key, value in layer.items() if key != "preset"})
        values |= translated
        origins |= dict.fromkeys(translated, origin)
        problems += [f"{origin}: {problem}" for problem in refused]
        for note in notes:
            logger.info("%s: %s", origin, note)
    params, invalid = _validate(values, methods)
    problems += [f"{origins.get(problem.split(':')[0], COMMAND_LINE)}: {problem}" for problem in invalid]
    if problems or params is None:
        raise ParameterError(list(dict.fromkeys(problems)))
    if methods is not None:
        _log_ineffective([key for key, origin in origins.items() if origin in (file_name, COMMAND_LINE)], params, methods)
    return params


def fields_of(methods: Methods) -> dict[str, FieldInfo]:
    """Return all parameters by name, with those of the methods, in documented order."""
    own = {name: info for method in methods.values() for name, info in method.settings.model_fields.items()}
    return {**Params.model_fields, **own}


def nearest(name: str, names: Iterable[str], count: int = 1) -> str:
    """Return `` (did you mean X?)`` with at most ``count`` similar names, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _log_ineffective(keys: Iterable[str], params: Params, methods: Methods) -> None:
    """Log each of these parameters that differs from its default and has no effect with the others."""
    values, defaults, users = params.model_dump(), fields_of(methods), users_of(methods)
    for key in keys:
        if key in users and values[key] != defaults[key].default and not has_effect(users[key], values):
            logger.info("%s belongs to %s and is ignored", key, describe_users(users[key]))


def _validate(values: dict[str, Any], methods: Methods | None) -> tuple[Params | None, list[str]]:
    """Return the parameters, or None, and a sentence for each problem, which begins with the parameter's name."""
    problems: list[str] = []
    models: list[type[BaseModel]] = [*(method.settings for method in (methods or {}).values()), Params]
    for model in models:
        try:
            values = values | dict(model.model_validate(values))
        except ValidationError as invalid:
            problems += [_describe_error(problem, values) for problem in invalid.errors()]
    if methods is not None:
        known = fields_of(methods)
        problems += [
            f"{key}: is not a parameter{nearest(key, [*known, *PUBLISHED_KEYS])}; docs/parameters.md lists them."
            for key in values
            if key not in known
        ]
        criteria = dict.fromkeys(name for method in methods.values() for name in method.selections)
        for key, kind, names in (("method", "method", [*methods]), ("selection", "criterion", [*criteria])):
            if isinstance(name := values.get(key), str) and name not in names:
                problems.append(f"{key}: '{name}' is not a {kind}{nearest(name, names)}; use one of {', '.join(names)}.")
        if not problems:
            problems = refusals(values, methods[values["method"]])
    return (None if problems else Params.model_validate(values)), problems


def _describe_error(problem: ErrorDetails, values: Mapping[str, Any]) -> str:
    """Return a pydantic error as one sentence: the key, what is wrong, what would be right."""
    (key, *inner), kind = problem["loc"], problem["type"]
    if kind == "sentence":
        return f"{key}: {problem['msg']}"
    subject, name = f"{key}:", str(key)
    numbers = [part for part in inner if isinstance(part, int)]
    if numbers:  # of an entry in a list, or of an option of one
        entry, option = values[name][numbers[0]], inner[inner.index(numbers[0]) + 1 :]
        title = entry if isinstance(entry, str) else next(iter(entry), "") if isinstance(entry, Mapping) else entry
        subject, name = (f"{key}: {option[0]} of {title}", str(option[0])) if option else (f"{key}: an entry", "entry")
        if kind == "unexpected_keyword_argument":
            known = [field.name for field in fields(Task if key == "tasks" else Source)[1:]]
            return f"{key}: {title} has no option '{name}'{nearest(name, known)}; there are {', '.join(known)}."
    expected = KINDS[kind].format(**problem.get("ctx", {})) if kind in KINDS else problem["msg"]
    given = "null" if problem["input"] is None else quote(problem["input"])
    return f"{subject} must be {WORDS.get(name, expected)}, not {given}."
