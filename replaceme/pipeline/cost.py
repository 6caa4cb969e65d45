"""cost: what the compression cost (metrics/compression.json), and the dozen figures that matter (metrics/summary.json).

This stage always runs, and so ends every run with the table of scores. The files are none of its outputs, so that no time gets
into dvc.lock. Git keeps both. The summary is a metric of the pipeline all the same, which DVC shows and compares.
"""

from collections.abc import Mapping
from statistics import geometric_mean
from typing import Any

from replaceme.base.files import read_json, read_remembered, round_floats, write_json
from replaceme.base.parameters import Params
from replaceme.base.plan import load_blocks
from replaceme.base.progress import logger
from replaceme.evaluation.tables import format_score_comparison
from replaceme.export.card import describe_check
from replaceme.methods.registry import METHODS, is_trained
from replaceme.running.cost import Cost, kept_cost
from replaceme.running.stage import COMPRESSION, Stage
from replaceme.running.workspace import Workspace

PEAKS = ("peak_memory_bytes", "peak_cuda_bytes")
# The task that needs an exact answer.
EXACT = "retrieval_exact"


def compression_figures(params: Params, work: Workspace) -> dict[str, Any]:
    """Return the cost of the compression, which is that of the stages from generate to export.

    Returns:
        ``stage_seconds`` (by stage, for those whose cost is known here), ``machines`` (in words, on which these ran),
        ``trained`` (whether anything was trained), and, if all are known, ``seconds`` (their sum), ``peak_memory_bytes`` and,
        if CUDA was used, ``peak_cuda_bytes`` (the largest of any stage); otherwise ``stages_not_measured`` (how many are not
        known).
    """
    costs = {name: cost for name in COMPRESSION if (cost := _read_cost(name, params, work))}
    seconds = {name: cost["seconds"] for name, cost in costs.items()}
    healed = read_remembered(work.metric("heal")) if params.heal_tokens else {}
    figures: dict[str, Any] = {"trained": is_trained(params.method, healed, read_remembered(work.metric("check")))}
    if costs:
        figures |= {"stage_seconds": seconds, "machines": sorted({cost["machine"] for cost in costs.values()})}
    if missing := len(COMPRESSION) - len(costs):
        return figures | {"stages_not_measured": missing}
    peaks = {key: peak for key in PEAKS if (peak := max(cost.get(key, 0) for cost in costs.values()))}
    return figures | {"seconds": round_floats(sum(seconds.values()), 4), **peaks}


def _read_cost(name: str, params: Params, work: Workspace) -> Cost | None:
    if work == Workspace():
        return kept_cost(name, params)
    record: dict[str, Cost] = read_json(work.record(name)) if work.record(name).is_file() else {}
    return record.get("cost")


def write_cost(params: Params, work: Workspace) -> None:
    """Write metrics/compression.json."""
    figures = compression_figures(params, work)
    if "seconds" in figures:
        logger.info("cost: the compression took %.4g s and %.1f GB", figures["seconds"], figures["peak_memory_bytes"] / 1e9)
    else:
        missing = [name for name in COMPRESSION if name not in figures.get("stage_seconds", {})]
        logger.info("cost: not known on this machine: %s", ", ".join(missing))
    write_json(work.metric("compression"), figures)


def summarize_run(
    evaluation: Mapping[str, Any], removed_layers: int, cost: Mapping[str, Any], checked: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the figures that matter; those that a run lacks are left out.

    Args:
        evaluation: metrics/evaluation.json.
        removed_layers: how many whole layers were removed.
        cost: metrics/compression.json.
        checked: metrics/check.json.

    Returns:
        Names and units as in docs/guides/sweeps.md.
    """
    unseen, ratios = evaluation.get("unseen", {}), evaluation.get("perplexity", {})
    seen = [
        ratios[task]["ratio"]
        for task, known in evaluation.get("calibration_text", {}).items()
        if task in ratios and (known["seen"] or known["same_domain"])
    ]
    figures = {
        "removed_layers": removed_layers,
        "size_percent": 100 - evaluation["parameters"]["removed_percent"] if "parameters" in evaluation else None,
        "unseen_ratio": unseen.get("perplexity_ratio"),
        "unseen_stderr": unseen.get("stderr_perplexity_ratio"),
        "unseen_kl": unseen.get("kl"),
        "own_text_ratio": checked.get("perplexity_ratio"),
        "plain_removal_ratio": checked.get("plain_removal", {}).get("perplexity_ratio"),
        "same_token": _multiply(unseen.get("agreement"), 100),
        "seen_ratio": geometric_mean(seen) if seen else None,
        "retention": evaluation.get("retention_percent"),
        "above_chance": evaluation.get("retention_above_chance_percent"),
        "exact_answers": _multiply(evaluation.get("accuracy", {}).get(EXACT, {}).get("pruned"), 100),
        "seconds": cost.get("seconds"),
        "memory_gb": _multiply(cost.get("peak_memory_bytes"), 1e-9),
        "gpu_memory_gb": _multiply(cost.get("peak_cuda_bytes"), 1e-9),
    }
    return {name: round_floats(value) for name, value in figures.items() if value is not None}


def _multiply(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def print_scores(work: Workspace) -> None:
    """Print the table of scores, and how the result compares with plain removal."""
    lines = [format_score_comparison(read_json(work.metric("evaluation"))), describe_check(read_json(work.metric("check")))]
    print("\n".join(filter(None, lines)))


def write_figures(params: Params, work: Workspace) -> None:
    """Write metrics/compression.json and metrics/summary.json, and print the table of scores."""
    write_cost(params, work)
    evaluation, cost = read_json(work.metric("evaluation")), read_json(work.metric("compression"))
    print_scores(work)
    removed, checked = sum(map(len, load_blocks(work.blocks))), read_json(work.metric("check"))
    write_json(work.metric("summary"), summarize_run(evaluation, removed, cost, checked))


STAGE = Stage(
    name="cost", run=write_figures, reads=(Workspace.blocks,), figures=("check", "evaluation"), methods=METHODS, always=True
)
