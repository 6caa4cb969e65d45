"""Accuracy through lm-eval: its tasks and metrics, with a scorer of ours that computes only the logits that are read.

Requests with the same context (the choices of an item) share its computation through the KV cache, and logits are
computed for nothing but the tokens that are scored.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from torch.nn.functional import log_softmax
from transformers import PreTrainedTokenizerBase

from replaceme.evaluation.perplexity import WINDOW
from replaceme.families import decoder_of
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

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False, verbose=False)
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        # Without the library's bar over tokenization: ours, over the passes, is the one that takes time.
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **_options: Any) -> list[tuple[float, bool]]:
        longest = int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 30)
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            by_context[tuple(context[-max(1, longest - len(continuation)) :])].append(index)
        results: dict[int, tuple[float, bool]] = {}
        batches = self._batches(by_context, requests)
        for contexts in progress(batches, self.description, "batches"):
            members = [(row, index) for row, context in enumerate(contexts) for index in by_context[context]]
            continuations = [requests[index][2] for _, index in members]
            scores = self._score(contexts, [row for row, _ in members], continuations)
            results |= {index: score for (_, index), score in zip(members, scores, strict=True)}
        return [results[index] for index in range(len(requests))]

    def _batches(
        self, by_context: Mapping[tuple[int, ...], list[int]], requests: Sequence[Request]
    ) -> list[list[tuple[int, ...]]]:
        """Group contexts of equal length, the longest first, so that a batch computes about ``batch_tokens`` tokens."""
        batches: list[list[tuple[int, ...]]] = []
        filled = 0
        for context in sorted(by_context, key=len, reverse=True):
            cost = len(context) + sum(len(requests[index][2]) for index in by_context[context])
            if not batches or len(batches[-1][0]) != len(context) or filled + cost > self.batch_tokens:
                batches.append([])
                filled = 0
            batches[-1].append(context)
            filled += cost
        return batches

    def _score(
        self, contexts: Sequence[tuple[int, ...]], rows: list[int], continuations: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Score continuations, each after the context at its row; all contexts have the same length."""
        device, cache = self.model.device, None
        prefixes = torch.tensor([context[:-1] for context in contexts], device=device)
        if prefixes.shape[1]:
            cache = decoder_of(self.model)(input_ids=prefixes, use_cache=True).past_key_values
            cache.batch_select_indices(torch.tensor(rows, device=device))
        # The last token of the context predicts the first of the continuation. Padding stands behind the text.
        inputs = [
            torch.tensor([contexts[row][-1], *continuation[:-1]]) for row, continuation in zip(rows, continuations, strict=True)
        ]
        ids = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)
        logits = self.model(ids, past_key_values=cache, use_cache=cache is not None).logits
        scores = []
        for row, continuation in zip(logits, continuations, strict=True):
            predictions = log_softmax(row[: len(continuation)].float(), dim=-1)
            target = torch.tensor(continuation, device=device)
            likelihood = predictions.gather(1, target[:, None]).sum()
            scores.append((float(likelihood), bool((predictions.argmax(-1) == target).all())))
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
