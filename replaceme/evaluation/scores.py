"""Score a model, and set the pruned model's scores beside the dense one's."""

from collections.abc import Sequence
from typing import Any

from replaceme.compute import resolve_device, use_threads
from replaceme.evaluation.continuation import continuation_items
from replaceme.evaluation.harness import CausalScorer, accuracies, multiple_choice
from replaceme.evaluation.perplexity import cut_windows, perplexities
from replaceme.evaluation.texts import task_kind, task_name, task_texts
from replaceme.files import read_json, rounded, write_json
from replaceme.models import Model, parameter_count, recorded_model
from replaceme.params import Params
from replaceme.progress import logger
from replaceme.workspace import Workspace

Scores = dict[str, Any]


def score_baseline(params: Params, work: Workspace) -> None:
    """Score the dense model and write its scores, which all experiments share."""
    scores = score_model(params, recorded_model(params, work.model_input), "dense model")
    write_json(work.baseline, scores)


def evaluate(params: Params, work: Workspace) -> None:
    """Score the pruned model, write metrics/evaluation.json and print the table."""
    pruned = Model(work.model, work.model.name, trust_remote_code=params.trust_remote_code)
    scores = score_model(params, pruned, "pruned model")
    comparison = compare(read_json(work.baseline), scores)
    write_json(work.metric("evaluation"), comparison)
    print(comparison_table(comparison))


def score_model(params: Params, model: Model, name: str) -> Scores:
    """Return ``{"perplexity": {task: {token, word, byte, stderr}}, "accuracy": {task: {…}}, "parameters": n}``."""
    use_threads(params.threads)
    loaded, tokenizer = model.load(params.eval_dtype, resolve_device(params.device)), model.tokenizer()
    perplexity = {
        task_name(task): perplexities(
            loaded,
            cut_windows(task_name(task), task_texts(task), tokenizer, params.eval_tokens),
            params.eval_batch_size,
            f"{name}: {task_name(task)}",
        )
        for task in params.tasks
        if task_kind(task) == "perplexity"
    }
    choices = {
        task_name(task): multiple_choice(task_name(task), continuation_items(task_texts(task)))
        for task in params.tasks
        if task_kind(task) == "continuation"
    }
    scorer = CausalScorer(loaded, tokenizer, params.eval_batch_size, f"{name}: {', '.join(choices)}")
    accuracy = accuracies(scorer, choices) if choices else {}
    shown = [f"{task} perplexity {scores.get('token', float('inf')):.4g}" for task, scores in perplexity.items()]
    shown += [f"{task} accuracy {100 * scores['accuracy']:.1f} %" for task, scores in accuracy.items()]
    logger.info("%s: %s", name, ", ".join(shown) or "no tasks")
    return {"perplexity": perplexity, "accuracy": accuracy, "parameters": parameter_count(loaded)}


def compare(dense: Scores, pruned: Scores) -> Scores:
    """Return the content of metrics/evaluation.json: for each score dense, pruned and what relates them."""
    comparison: Scores = {}
    for unit, key in (("token", "perplexity"), ("word", "word_perplexity"), ("byte", "byte_perplexity")):
        for task, scores in dense["perplexity"].items():
            both = scores, pruned["perplexity"][task]
            if all(unit in side for side in both):
                a, b = (side[unit] for side in both)
                comparison.setdefault(key, {})[task] = {"dense": a, "pruned": b, "ratio": b / a}
                if unit == "token" and all("stderr" in side for side in both):
                    comparison[key][task] |= {"stderr_dense": both[0]["stderr"], "stderr_pruned": both[1]["stderr"]}
    if dense["accuracy"]:
        comparison["accuracy"] = {
            task: {
                "dense": scores["accuracy"],
                "pruned": pruned["accuracy"][task]["accuracy"],
                "stderr_dense": scores["stderr"],
                "stderr_pruned": pruned["accuracy"][task]["stderr"],
            }
            for task, scores in dense["accuracy"].items()
        }
        means = [sum(task[side] for task in comparison["accuracy"].values()) for side in ("dense", "pruned")]
        comparison["retention_percent"] = 100 * means[1] / means[0] if means[0] else 0.0
    comparison["parameters"] = {
        "dense": dense["parameters"],
        "pruned": pruned["parameters"],
        "removed_percent": 100 * (1 - pruned["parameters"] / dense["parameters"]),
    }
    result: Scores = rounded(comparison)
    return result


def comparison_table(comparison: Scores) -> str:
    """Return the comparison as a small text table."""
    rows: list[tuple[str, ...]] = [("", "dense", "pruned", "")]
    for task, pair in comparison.get("perplexity", {}).items():
        rows.append((f"{task} perplexity", f"{pair['dense']:.4g}", f"{pair['pruned']:.4g}", f"x {pair['ratio']:.3g}"))
    for task, pair in comparison.get("accuracy", {}).items():
        cells = [f"{100 * pair[side]:.1f} ± {100 * pair[f'stderr_{side}']:.1f} %" for side in ("dense", "pruned")]
        rows.append((f"{task} accuracy", *cells, f"{100 * pair['pruned'] / pair['dense']:.1f} % kept" if pair["dense"] else ""))
    size = comparison["parameters"]
    rows.append(
        ("parameters", f"{size['dense'] / 1e6:.1f} M", f"{size['pruned'] / 1e6:.1f} M", f"−{size['removed_percent']:.1f} %")
    )
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    # The table of the last run again, when nothing had to be scored anew.
    print(comparison_table(read_json(Workspace().metric("evaluation"))))
