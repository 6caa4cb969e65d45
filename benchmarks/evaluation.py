"""Speed of the evaluation of each task, in tokens per second, relative to a bare forward pass over the same tokens.

``python -m benchmarks.evaluation [share]`` uses the model, tasks and settings of params.yaml, and ``share`` (default 0.25) of
each task's items. Only the tokens that must be computed count: each context once, whatever the number of its choices. The bare
pass packs them into windows of 1024 tokens and computes no logits. The two passes alternate, and their medians are compared.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from replaceme.base.parameters import read_params
from replaceme.base.progress import silence_libraries
from replaceme.evaluation.accuracy import score_suite
from replaceme.evaluation.perplexity import score_windows
from replaceme.evaluation.requests import Suite
from replaceme.evaluation.scorer import CausalScorer, Request
from replaceme.evaluation.tasks import task_fingerprints, task_items, task_kind, task_name, task_texts
from replaceme.evaluation.windows import WINDOW, Windows, cut_windows
from replaceme.models.devices import resolve_device, use_processor
from replaceme.models.families import decoder_of
from replaceme.models.find import find_model

ROUNDS = 3
LIMIT = 0.7


def main(share: float) -> None:
    """Measure and print."""
    silence_libraries()
    params = read_params(Path("params.yaml"))
    use_processor(params.threads)
    source = find_model(params)
    model, tokenizer = source.load(params.eval_dtype, resolve_device(params.device)), source.tokenizer()
    fingerprints = task_fingerprints(params)

    def bare(windows: list[torch.Tensor]) -> None:
        base = decoder_of(model)
        with torch.inference_mode():
            for start in range(0, len(windows), params.eval_batch_size):
                base(input_ids=torch.stack(windows[start : start + params.eval_batch_size]).to(model.device), use_cache=False)

    steps: dict[str, tuple[Callable[[], Any], list[int]]] = {}
    for task in params.tasks:
        name = task_name(task)
        if task_kind(task) == "perplexity":
            limit = int((params.eval_tokens or 1 << 16) * share)
            windows = cut_windows(name, task_texts(task), tokenizer, limit)
            ids = [int(token) for window in windows.ids for token in window[:-1]]
            steps[name] = (_make_perplexity_step(model, windows, params.eval_batch_size), ids)
        else:
            limit = max(int(len(task_items(task)) * share), 1) if task_kind(task) != "lm-eval" else 100
            scorer = RecordingScorer(model, tokenizer, params.eval_batch_size, "benchmark")
            step = _make_accuracy_step(scorer, replace(task, limit=limit), fingerprints[name])
            step()
            steps[name] = (step, _list_computed_tokens(scorer.pairs))
    print(f"{params.eval_dtype}, batch {params.eval_batch_size}, {params.threads} threads, median of {ROUNDS}")
    total = {"bare": 0.0, "evaluation": 0.0}
    for name, (step, ids) in steps.items():
        # Repeat tokens until the last window is full: a shorter one would be a batch of another shape.
        windows_needed = -(-len(ids) // WINDOW)
        filled = (ids * (windows_needed * WINDOW // len(ids) + 1))[: windows_needed * WINDOW]
        packed = list(torch.tensor(filled).view(-1, WINDOW))
        times: dict[str, list[float]] = {"bare": [], "evaluation": []}
        for _ in range(ROUNDS):
            for kind, work in (("bare", lambda packed=packed: bare(packed)), ("evaluation", step)):
                began = time.perf_counter()
                work()
                times[kind].append(time.perf_counter() - began)
        rates = {
            "bare": len(packed) * WINDOW / statistics.median(times["bare"]),
            "evaluation": len(ids) / statistics.median(times["evaluation"]),
        }
        for kind, rate in rates.items():
            total[kind] += len(ids) / rate
        print(
            f"{name:<26} {len(ids):>6} tokens  {rates['evaluation']:6.0f} of {rates['bare']:6.0f} tokens/s"
            f"  {rates['evaluation'] / rates['bare']:.3f}"
        )
    print(f"{'all tasks':<26} {total['bare'] / total['evaluation']:.3f} (at least {LIMIT})")


def _make_perplexity_step(model: Any, windows: Windows, batch_size: int) -> Callable[[], Any]:
    return lambda: score_windows(model, windows, batch_size, "benchmark")


class RecordingScorer(CausalScorer):
    """A scorer that keeps the token ids of its requests: context and continuation."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pairs: list[tuple[list[int], list[int]]] = []

    def _loglikelihood_tokens(self, requests: Sequence[Request], **options: Any) -> list[tuple[float, bool]]:
        self.pairs += [(context, continuation) for _, context, continuation in requests]
        return super()._loglikelihood_tokens(requests, **options)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.pairs += [(self.tok_encode(request.args[0]), []) for request in requests]
        return super().generate_until(requests, disable_tqdm)


def _make_accuracy_step(scorer: CausalScorer, task: Any, fingerprint: Any) -> Callable[[], Any]:
    def step() -> None:
        suite = Suite()
        suite.add(task, fingerprint)
        score_suite(scorer, suite)

    return step


def _list_computed_tokens(pairs: Sequence[tuple[list[int], list[int]]]) -> list[int]:
    """Return the ids that scoring must compute: each context once, and each continuation without its last token."""
    contexts: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for context, continuation in pairs:
        contexts.setdefault(tuple(context), set()).add(tuple(continuation))
    return [
        token for context, tails in contexts.items() for part in (context, *(tail[:-1] for tail in tails)) for token in part
    ]  # fmt: skip


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 0.25)
