"""Accuracy through lm-eval: its tasks and metrics, with a scorer of ours that computes only the logits that are read.

Requests are sorted by length and batched by tokens; padding stands behind the text, where a causal model doesn't see
it; logits are computed for the last positions alone, those that predict the continuations.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from torch.nn.functional import log_softmax
from transformers import PreTrainedTokenizerBase

from replaceme.evaluation.perplexity import WINDOW
from replaceme.progress import progress
from replaceme.tokenization import start_of_text

Request = tuple[tuple[str, str], list[int], list[int]]


class CausalScorer(TemplateLM):
    """lm-eval's view of a causal model that is already loaded."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, description: str):
        super().__init__()
        self.model, self.tokenizer, self.description = model, tokenizer, description
        self.batch_tokens = batch_size * WINDOW
        self.start = start_of_text(tokenizer)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return self.start[0] if self.start else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False, verbose=False)
        return ids

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        results: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        bar = progress(order, self.description, "requests", total=len(order))
        batch: list[int] = []
        for index in bar:
            longest = len(requests[batch[0]][1]) + len(requests[batch[0]][2]) if batch else 0
            if batch and longest * (len(batch) + 1) > self.batch_tokens:
                results |= self._score([requests[member] for member in batch], batch)
                batch = []
            batch.append(index)
        if batch:
            results |= self._score([requests[member] for member in batch], batch)
        return [results[index] for index in range(len(requests))]

    def _score(self, requests: list[Request], indices: list[int]) -> dict[int, tuple[float, bool]]:
        texts = [torch.tensor(context + continuation) for _, context, continuation in requests]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(self.model.device)
        # The token at position p is predicted at p − 1; the earliest one needed decides how many positions to keep.
        first = min(len(context) for _, context, _ in requests) - 1
        logits = self.model(ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        scores = {}
        for row, (index, (_, context, continuation)) in enumerate(zip(indices, requests, strict=True)):
            start = len(context) - 1 - first
            predictions = log_softmax(logits[row, start : start + len(continuation)].float(), dim=-1)
            target = torch.tensor(continuation, device=predictions.device)
            chosen = predictions.gather(1, target[:, None]).sum()
            scores[index] = (float(chosen), bool((predictions.argmax(-1) == target).all()))
        return scores

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("perplexity is computed in replaceme.evaluation.perplexity")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("no task that is offered generates text")


def multiple_choice(name: str, items: list[dict[str, Any]]) -> ConfigurableTask:
    """Return an lm-eval task from items ``{query, choices, gold}``; it reports acc and acc_norm."""
    from datasets import Dataset

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )


def accuracies(scorer: CausalScorer, tasks: dict[str, ConfigurableTask]) -> dict[str, dict[str, float]]:
    """Return ``{task: {accuracy, stderr, items}}``; accuracy is length-normalised where the task has that."""
    outcome = evaluate(lm=scorer, task_dict=tasks, bootstrap_iters=1, log_samples=False)
    scores = {}
    for name in tasks:
        result = outcome["results"][name]
        metric = "acc_norm" if "acc_norm,none" in result else "acc"
        scores[name] = {
            "accuracy": float(result[f"{metric},none"]),
            "stderr": float(result[f"{metric}_stderr,none"]),
            "items": int(outcome["n-samples"][name]["effective"]),
        }
    return scores
