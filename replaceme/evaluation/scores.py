"""Score a model on all tasks, for the stages baseline and evaluate.

The dense model is scored once. Its scores are saved with the token ids of all requests, so that every pruned model scores the
same requests, and with the score of each item, so that differences can be tested on the same items.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from replaceme.base.compute import kind_of, use_processor
from replaceme.base.files import read_json, write_json
from replaceme.base.params import Params
from replaceme.base.progress import logger
from replaceme.base.versions import SCORES, versions
from replaceme.evaluation import harness
from replaceme.evaluation.perplexity import cut_windows, perplexities, score_windows
from replaceme.evaluation.prompts import written
from replaceme.evaluation.requests import Requests
from replaceme.evaluation.scorer import CausalScorer
from replaceme.evaluation.seen import Calibration
from replaceme.evaluation.tasks import check_unchanged, task_kind, task_name, task_texts
from replaceme.models.kv_cache import cache_bytes_per_token
from replaceme.models.memory import load_within
from replaceme.models.model import Model, embedding_count, parameter_count, positions_of
from replaceme.models.model_files import WEIGHTS


@dataclass
class Scores:
    """The scores of a model.

    Attributes:
        figures: ``perplexity`` (task → token, word, byte, stderr), ``accuracy`` (task → accuracy, stderr, items, metric,
            fewshots, by_size), ``parameters``, ``parameters_without_embeddings``, ``disk_bytes``, ``kv_cache_bytes_per_token``,
            ``device`` (cpu, cuda) and ``made_with`` (the kind of the device, as ``processor``, and the version of each
            package). Where the calibration text is known, ``calibration_text`` (task → seen, same_domain, and
            overlap, where more than its sources is known: ``replaceme.evaluation.seen``).
        items: ``accuracy/<task>/<n>`` (items,), where n counts the single tasks of a group, and ``counts/<task>`` (windows,),
            both float64; and what ``score_windows`` returns for each task, as ``losses/<task>`` and so on. And
            ``articles/<task>/<n>`` (items,) int64, equal for items of one article, and ``texts/<task>`` (windows,) int64, where
            items share articles and windows texts.
        requests: the token ids of all scored requests.
        continuations: how the model goes on after each of ``replaceme.evaluation.prompts.PROMPTS``; empty for a model that is
            compared with none.
    """

    figures: dict[str, Any]
    items: dict[str, Tensor]
    requests: Requests
    continuations: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the scores into ``folder``."""
        write_json(folder / "scores.json", self.figures)
        save_file(self.items or {"none": torch.zeros(1)}, folder / "items.safetensors")
        write_json(folder / "continuations.json", self.continuations)
        self.requests.save(folder)

    @classmethod
    def load(cls, folder: Path) -> "Scores":
        """Read what ``save`` wrote."""
        figures, items = read_json(folder / "scores.json"), load_file(folder / "items.safetensors")
        return cls(figures, items, Requests.load(folder), read_json(folder / "continuations.json"))


def score_model(
    params: Params,
    source: Model,
    name: str,
    found: dict[str, Any],
    dense: Scores | None = None,
    calibration: Calibration | None = None,
    *,
    is_dense: bool = False,
) -> Scores:
    """Score a model on the tasks of ``params``.

    Args:
        params: tasks and settings of the evaluation.
        source: the model's files.
        name: its name in progress bars and in the log.
        found: the tasks' identities (``task_fingerprints``).
        dense: the dense model's scores, if this is another model: it scores the same requests, and its divergence from the
            dense model.
        calibration: the text that the model was fitted to, to be looked for in the tasks; None if there is none.
        is_dense: whether pruned models will be compared with this one.
    """
    requests = dense.requests if dense else Requests()
    use_processor(params.threads)
    tokenizer, positions = source.tokenizer(), positions_of(source.config())
    # Prepare every task first, so that errors in a task come before the model is loaded.
    suite = harness.Suite()
    seen: dict[str, dict[str, float]] = {}
    for task in params.tasks:
        text, identity, reported = task_name(task), found[task_name(task)], set(suite.reported)
        if task_kind(task) != "perplexity":
            suite.add(task, identity)
        elif text not in requests.windows:
            requests.windows[text] = cut_windows(text, task_texts(task), tokenizer, params.eval_tokens, positions)
        if calibration and task_kind(task) == "perplexity":
            decoded = (tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in requests.windows[text].windows)
            seen[text] = calibration.in_windows(text, task, identity, decoded)
        elif calibration:
            for each in sorted(suite.reported.keys() - reported):
                singles = [suite.singles[single] for single in suite.reported[each].singles]
                seen[each] = calibration.in_items(each, task, identity, singles, task.limit)
        check_unchanged(task, identity)
    harness.check_room(suite, positions)
    model = load_within(source, params, params.eval_dtype)
    perplexity: dict[str, dict[str, float]] = {}
    items: dict[str, Tensor] = {}
    for text, windows in requests.windows.items():
        reference = {part: dense.items[f"{part}/{text}"] for part in ("likely_ids", "likely_logs")} if dense else None
        scored = score_windows(model, windows, params.eval_batch_size, f"{name}: {text}", reference, keep_likely=is_dense)
        perplexity[text] = perplexities(scored["losses"], windows)
        items |= {f"{part}/{text}": tensor for part, tensor in {**scored, "counts": windows.predictions()}.items()}
        if (texts := windows.text_numbers()) is not None:
            items[f"texts/{text}"] = texts
    scorer = CausalScorer(model, tokenizer, params.eval_batch_size, f"{name}: {', '.join(suite.reported)}", requests.encodings)
    outcome = harness.run(scorer, suite)
    items |= {f"accuracy/{task}/{n}": part for task, parts in outcome.items.items() for n, part in enumerate(parts)}
    items |= {
        f"articles/{task}/{n}": own
        for task, parts in outcome.articles.items()
        for n, own in enumerate(parts)
        if own is not None
    }
    figures = {
        "perplexity": perplexity | outcome.perplexity,
        "accuracy": outcome.accuracy,
        "parameters": parameter_count(model),
        "parameters_without_embeddings": parameter_count(model) - embedding_count(model),
        "disk_bytes": sum(path.stat().st_size for path in source.files(WEIGHTS)),
        "device": model.device.type,
        "made_with": {"processor": kind_of(str(model.device)), **versions(SCORES)},
    }
    if (size := cache_bytes_per_token(model)) is not None:
        figures["kv_cache_bytes_per_token"] = size
    if calibration:
        figures["calibration_text"] = seen
    shown = [f"{task} perplexity {scores['token']:.4g}" for task, scores in perplexity.items() if "token" in scores]
    shown += [f"{task} word perplexity {scores['word']:.4g}" for task, scores in outcome.perplexity.items() if "word" in scores]
    shown += [f"{task} accuracy {100 * scores['accuracy']:.1f} %" for task, scores in outcome.accuracy.items()]
    logger.info("%s: %s", name, ", ".join(shown) or "no tasks")
    texts_of = written(model, tokenizer, name) if is_dense or dense else []
    return Scores(figures, items, requests, texts_of)
