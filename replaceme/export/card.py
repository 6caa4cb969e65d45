"""The model card of a pruned model: original, changes, how to load it, limits, scores, and how to reproduce them.

It has no local paths and no secrets. The scores are known only after the export; the stage report writes a card
that has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load

from replaceme import __version__
from replaceme.base.combinations import NEW_WEIGHTS
from replaceme.base.config import WITHOUT_EFFECT, settings_yaml
from replaceme.base.entries import Source, dataset_title
from replaceme.base.files import read_json, without_folder
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.edits.edits import Edits
from replaceme.export.transformers4 import transformers_4_obstacle
from replaceme.methods.registry import FIELDS, has_effect
from replaceme.models.families import Linear
from replaceme.models.model import Model
from replaceme.models.model_files import CARD
from replaceme.models.own_form import FILE
from replaceme.running.stage import SCORE_SETTINGS
from replaceme.running.versions import list_versions
from replaceme.running.workspace import Workspace

# The settings that determine the model: without those of its scores, and those that say where it is computed.
SETTINGS = tuple(key for key in FIELDS if key not in (*SCORE_SETTINGS, *WITHOUT_EFFECT, "device", "device_map"))
# Entries of the dense model's card that also hold for the pruned model.
INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class RunResults:
    """What a card says of a run besides its settings and edits.

    Attributes:
        fit: the figures of metrics/solve.json.
        healed: those of metrics/heal.json; empty without healing.
        checked: those of metrics/check.json.
        made_with: the packages that the model, and its scores, were made with → their versions.
        scores: the scores as Markdown; empty before the evaluation.
        entries: the same scores for the hub's metadata.
        continuations: how both models go on after a few prompts, as Markdown; empty before the evaluation.
    """

    fit: Mapping[str, Any] = field(default_factory=dict)
    healed: Mapping[str, Any] = field(default_factory=dict)
    checked: Mapping[str, Any] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)
    scores: str = ""
    entries: Sequence[EvalResult] = ()
    continuations: str = ""

    @classmethod
    def of(cls, work: Workspace) -> "RunResults":
        """Read what is known before the evaluation."""
        fit, healed, checked = (read_json(work.metric(name)) for name in ("solve", "heal", "check"))
        return cls(fit, healed, checked, read_json(work.model_versions))


def render_card(params: Params, source: Model, edits: Edits, results: RunResults, path: str = ".") -> str:
    """Return the README.md of a pruned model's folder.

    Args:
        params: the settings.
        source: the dense model.
        edits: the changes.
        results: figures and scores, as far as they are known.
        path: what the example loads: the model's name on the hub, or the folder of the card.
    """
    removed, layers = edits.removed_layers, int(source.config().num_hidden_layers)
    title = f"{source.name} without {_describe_removed(edits, f'{len(removed)} of its {layers} layers')}"
    kinds = ["depth-pruning"] * bool(removed or not edits.parts) + ["width-pruning"] * bool(edits.parts)
    parts = [
        "---",
        _format_metadata(source, title, kinds, results.entries),
        "---",
        "",
        f"# {title}",
        "",
        *_describe_changes(params, source, edits, results.healed),
        *_describe_fit(edits, results.fit),
        *(["", describe_check(results.checked).replace(" x ", " × ")] if results.checked else []),
        "",
        "## How to load it",
        "",
        *_write_example(path, source.trust_remote_code or edits.has_own_form),
        "",
        _describe_compatibility(source, edits),
        "",
        "## Limits",
        "",
        *_list_limits(params, source),
    ]
    if results.scores:
        parts += ["", "## Scores", "", results.scores]
    if results.continuations:
        parts += ["", "## Continuations", "", results.continuations]
    return "\n".join([*parts, "", "## How to reproduce", "", *_describe_reproduction(params, source, results)])


def _describe_removed(edits: Edits, layers: str) -> str:
    """Say what was removed: whole layers, which ``layers`` says in words, and parts of the others."""
    return " and ".join(filter(None, (layers if edits.removed_layers or not edits.parts else "", edits.parts)))


def _format_metadata(source: Model, title: str, kinds: Sequence[str], entries: Sequence[EvalResult]) -> str:
    """Return the card's YAML block for the hub."""
    known = _read_metadata(source)
    return ModelCardData(
        # A local copy has no name on the hub: its own card's base model stands for it.
        base_model=source.name if source.commit else known.get("base_model"),
        **{key: known.get(key) for key in INHERITED},
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", *kinds, "replaceme"],
        model_name=title if entries else None,
        eval_results=list(entries) or None,
    ).to_yaml()


def _read_metadata(source: Model) -> dict[str, Any]:
    """Return the YAML block of the dense model's own card; empty where there is none."""
    try:
        known = metadata_load(source.folder / CARD) or {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        logger.warning("model_path: the YAML block of %s's %s can't be read; its licence is not copied", source.name, CARD)
        return {}
    return {key: value for key, value in known.items() if value and isinstance(value, str | list)}


def _describe_changes(params: Params, source: Model, edits: Edits, healed: Mapping[str, Any]) -> list[str]:
    """Say what was removed and what replaced it."""
    commit = f" (commit {source.commit})" if source.commit else ""
    removed = _describe_removed(edits, f"{name_layers(edits.removed_layers)} (counted from 0)")
    verb = "was" if len(edits.removed_layers) == 1 and not edits.parts else "were"
    lines = [f"{removed[:1].upper()}{removed[1:]} {verb} removed from `{source.name}`{commit} with {edits.title}."]
    if source.disclosure:
        lines += [source.disclosure]
    if edits.transforms:
        lines += [
            f"A linear map was folded into the MLP of {name_layers([*edits.transforms])}. It was fitted to calibration text, "
            "without training the model, and adds no parameters: the architecture is unchanged."
        ]
    lines += [
        f"The weights of the linear modules of {name_layers([*mixture])} were merged into those of layer {layer}, without "
        "training."
        for layer, mixture in sorted(edits.mixtures.items())
    ]
    for layer, channels in sorted(edits.channels.items()):
        own = int((channels[:, 0] == layer).sum())
        width = "" if edits.config else " Its width is unchanged, and no parameters were added."
        if own < len(channels):
            others = f"{len(channels) - own:,} channels of removed layers"
            lines += [f"The MLP of layer {layer} now has {own:,} of its own channels and {others}.{width}"]
    lines += _describe_new_weights(params, edits, healed)
    if edits.model_edit:
        lines += edits.model_edit.sentences()
    if scalars := {layer: float(P) for layer, P in sorted(edits.operators.items()) if not P.ndim}:
        factors = ", ".join(f"by {1 / scale:.4g} after layer {layer}" for layer, scale in scalars.items())
        lines += [
            "Without the removed layers the residual stream has another magnitude than the later layers expect. To compensate, "
            f"everything that the layers after the cut add to it was multiplied {factors}. This adds no parameters: the "
            "architecture is unchanged."
        ]
    if mapped := [layer for layer, P in edits.operators.items() if P.ndim]:
        lines += [f"A linear map was added after {name_layers(mapped)}; it multiplies the whole hidden state."]
    if edits.has_own_form:
        lines += [
            "",
            "No class of transformers describes this architecture. Load the model with `trust_remote_code=True`: it uses the "
            f"file `{FILE}` beside its weights.",
        ]
    return lines


# What healing trained, by ``heal_weights``.
TRAINED = {
    "all": "All weights of the kept layers",
    "after_cut": "All weights of {layers}",
    "outputs": "The attention and MLP output projections of {layers}",
    "lora": "The linears of the kept layers, by changes of low rank,",
}


def _describe_new_weights(params: Params, edits: Edits, healed: Mapping[str, Any]) -> list[str]:
    """Say which output projections of the kept layers were refitted or trained."""
    linears: tuple[tuple[Linear, str], ...] = (("attention_output", "attention"), ("mlp_output", "MLP"))
    corrected = {word: [layer for layer, name in edits.corrections if name == linear] for linear, word in linears}
    if edits.parameters:
        start = ", starting from weights refitted in closed form" if params.repair or params.transform in NEW_WEIGHTS else ""
        # With narrower MLPs, the states differ from the original's from the first layer on.
        trained = TRAINED[params.heal_weights].format(
            layers="the kept layers" if edits.config else "the layers from the cut on"
        )
        tokens = f"{healed['training_tokens']:,} tokens of text"
        return [f"{trained} were trained on {tokens} to match the original model's predictions{start}."]
    return [
        f"The {word} output projection of {name_layers(layers)} was refitted in closed form, without training."
        for word, layers in corrected.items()
        if layers
    ]


def _describe_fit(edits: Edits, fit: Mapping[str, Any]) -> list[str]:
    """Say how well the map, or the new weights, reproduce the state at the cut; nothing of a fit that is not in the model."""
    if edits.only_remove:
        return []
    cut = "the first cut" if len(edits.transforms | edits.operators) > 1 else "the cut"
    residuals = [fit[key] for key in ("relative_residual", "weighted_residual") if key in fit]
    return [line for residual in residuals for line in ("", f"Relative residual of the fit at {cut}: {residual:.4g}.")]


def describe_check(checked: Mapping[str, Any]) -> str:
    """Say how a result compares with plain removal, given metrics/check.json; empty without a comparison."""
    if not checked:
        return ""
    plain = checked["plain_removal"]
    layers = name_layers([*range(plain["first_layer"], plain["last_layer"] + 1)])
    result, other = (
        f"x {each['perplexity_ratio']:.3g} the dense model's perplexity, KL {each['kl']:.3f}" for each in (checked, plain)
    )
    text = f"{checked['tokens']:,} tokens that the dense model wrote"
    if checked["plain_removal_is_exported"]:
        return f"Plain removal of {layers} is exported. On {text}: {other}; the result of these settings: {result}."
    worse = " This is worse." * (checked["kl"] > plain["kl"])
    return f"On {text}: {result}; with {layers} removed and nothing in their place: {other}.{worse}"


def _write_example(path: str, own_code: bool) -> list[str]:
    """Return code that loads the model and generates with it."""
    trusted = ", trust_remote_code=True" if own_code else ""
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{path}"{trusted})',
        f'tokenizer = AutoTokenizer.from_pretrained("{path}"{trusted})',
        'prompt = tokenizer("The river", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))",
        "```",
    ]


def _describe_compatibility(source: Model, edits: Edits) -> str:
    """Say which versions of transformers read the model."""
    if edits.has_own_form:
        return f"It needs transformers 5, which `{FILE}` is written for."
    if why := transformers_4_obstacle(source.config().to_dict()):
        return f"It needs transformers 5: {why}, which older versions would read as another model."
    return "Its config.json has the keys of transformers 5 and, beside them, those of transformers 4."


def _list_limits(params: Params, source: Model) -> list[str]:
    """Return what a user should know before use, as a list; files are named without their folder."""
    sources = params.dataset if not isinstance(params.dataset, str) else (Source(params.dataset),)
    text = dataset_title(tuple(replace(source, name=without_folder(source.name)) for source in sources))
    return [
        "- Pruning harms fluency less than facts, reasoning and finding things in the context: what reads well can be wrong.",
        f"- Calibration text: {text}. Other kinds of text and other languages can lose far more.",
        f"- Safety, bias and refusals were not checked. What is known of `{source.name}` there may not hold for this model.",
    ]


def _describe_reproduction(params: Params, source: Model, results: RunResults) -> list[str]:
    """Return the settings, as a file that every console script accepts, and the commands."""
    if source.commit:
        params = params.model_copy(update={"revision": source.commit})
    values = params.model_dump()
    keys = [
        key
        for key in (*SETTINGS, *(SCORE_SETTINGS if results.scores else ()))
        if has_effect(key, values) and (values[key] is not None or FIELDS[key].default is not None)
    ]
    made_with = f"Made with {list_versions(results.made_with)}; other versions or another processor can change the last digits."
    return [
        f"With replaceme-dvc {__version__}, save these settings as `settings.yaml` (local files and folders are given by name, "
        "without their path):",
        "", "```yaml", settings_yaml(params, keys).rstrip(), "```", "",
        "```bash", "replaceme prune --config settings.yaml", "```", "",
        "Or write them into the pipeline's `params.yaml` and run `dvc repro`.",
        "", *([made_with, ""] if results.made_with else ()),
    ]  # fmt: skip


def name_layers(layers: Sequence[int]) -> str:
    """Name layers in words: ``layer 3`` or ``layers 3–4, 9``."""
    # Layer minus position is constant in a run of consecutive layers.
    runs = [[*map(itemgetter(1), run)] for _, run in groupby(enumerate(sorted(layers)), lambda pair: pair[1] - pair[0])]
    ranges = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {ranges}"
