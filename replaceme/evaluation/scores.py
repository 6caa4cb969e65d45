"""Score a model on all tasks, for the stages baseline and evaluate.

``requests`` says what is scored, ``perplexity`` and ``scorer`` run the model on it, ``accuracy`` and ``standard_errors`` make
scores of the figures of windows and items. The dense model is scored once; its figures of each window and item are kept, so
that pruned models are compared with it on the same ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.base.files import read_json, write_json
from replaceme.base.parameters import Params
from replaceme.base.progress import logger
from replaceme.evaluation.accuracy import score_suite
from replaceme.evaluation.contamination import CalibrationText, find_contamination
from replaceme.evaluation.continuations import continue_prompts
from replaceme.evaluation.perplexity import compute_perplexities, score_windows
from replaceme.evaluation.requests import prepare_requests
from replaceme.evaluation.scorer import CausalScorer
from replaceme.models.devices import kind_of, use_processor
from replaceme.models.kv_cache import cache_bytes_per_token
from replaceme.models.memory import load_within_budget
from replaceme.models.model import Model, embedding_count, parameter_count
from replaceme.models.model_files import WEIGHTS
from replaceme.running.versions import SCORES, versions


@dataclass
class Scores:
    """The scores of a model.

    Attributes:
        figures: ``perplexity`` (task → token, word, byte, stderr), ``accuracy`` (task → accuracy, stderr, items, metric,
            fewshots, by_size), ``parameters``, ``parameters_without_embeddings``, ``disk_bytes``, ``kv_cache_bytes_per_token``,
            ``device`` (cpu, cuda) and ``made_with`` (the kind of the device, as ``processor``, and the version of each
            package). Where the calibration text is known, ``calibration_text`` (``find_contamination``).
        items: by ``<part>/<task>``: a text's windows (``Windows.tensors``) and what ``score_windows`` returns for them; the
            accuracy of each item of other tasks, and their sample (``SuiteScores.items``).
        continuations: how the model goes on after each of the report's prompts; empty for a model that is compared with none.
    """

    figures: dict[str, Any]
    items: dict[str, Tensor]
    continuations: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the scores into ``folder``."""
        write_json(folder / "scores.json", self.figures)
        save_file(self.items, folder / "items.safetensors")
        write_json(folder / "continuations.json", self.continuations)

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        """Read what ``save`` wrote."""
        figures, continuations = read_json(folder / "scores.json"), read_json(folder / "continuations.json")
        return cls(figures, load_file(folder / "items.safetensors"), continuations)


def score_model(
    params: Params,
    source: Model,
    fingerprints: Mapping[str, Any],
    dense: Scores | None = None,
    calibration: CalibrationText | None = None,
    *,
    is_dense: bool = False,
) -> Scores:
    """Score a model on the tasks of ``params``.

    Args:
        params: tasks and settings of the evaluation.
        source: the model's files.
        fingerprints: what identifies the tasks' content (``task_fingerprints``).
        dense: the dense model's scores, if this is a pruned one: the divergence from it is scored too.
        calibration: the text that the model was fitted to, to be looked for in the tasks; None if there is none.
        is_dense: whether pruned models will be compared with this one.
    """
    name = "dense model" if is_dense else "pruned model" if dense else source.name
    use_processor(params.threads)
    tokenizer, requests = source.tokenizer(), prepare_requests(params, source, fingerprints, dense.items if dense else None)
    contamination = calibration and find_contamination(calibration, requests, fingerprints, tokenizer)
    model = load_within_budget(source, params, params.eval_dtype)
    perplexity: dict[str, dict[str, float]] = {}
    items: dict[str, Tensor] = {}
    for text, windows in requests.windows.items():
        likely = {part: dense.items[f"{part}/{text}"] for part in ("likely_ids", "likely_logs")} if dense else None
        scored = score_windows(model, windows, params.eval_batch_size, f"{name}: {text}", likely, keep_likely=is_dense)
        perplexity[text] = compute_perplexities(scored["losses"], windows)
        items |= {**windows.tensors(text), **{f"{part}/{text}": tensor for part, tensor in scored.items()}}
    description = f"{name}: {', '.join(requests.suite.reported)}"
    answers = score_suite(CausalScorer(model, tokenizer, params.eval_batch_size, description), requests.suite)
    figures = {"perplexity": perplexity | answers.perplexity, "accuracy": answers.accuracy, **_measure_sizes(model, source)}
    if contamination is not None:
        figures["calibration_text"] = contamination
    logger.info("%s: %s", name, ", ".join(_describe_scores(figures)) or "no tasks")
    return Scores(figures, items | answers.items, continue_prompts(model, tokenizer, name) if is_dense or dense else [])


def _measure_sizes(model: Any, source: Model) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "parameters": parameter_count(model),
        "parameters_without_embeddings": parameter_count(model) - embedding_count(model),
        "disk_bytes": sum(path.stat().st_size for path in source.files(WEIGHTS)),
        "device": model.device.type,
        "made_with": {"processor": kind_of(str(model.device)), **versions(SCORES)},
    }
    if (size := cache_bytes_per_token(model)) is not None:
        figures["kv_cache_bytes_per_token"] = size
    return figures


def _describe_scores(figures: Mapping[str, Any]) -> list[str]:
    words = []
    for task, scores in figures["perplexity"].items():
        if unit := next((unit for unit in ("token", "word") if unit in scores), None):
            words.append(f"{task} {'word ' * (unit == 'word')}perplexity {scores[unit]:.4g}")
    return words + [f"{task} accuracy {100 * scores['accuracy']:.1f} %" for task, scores in figures["accuracy"].items()]
