"""lm-eval's interface to a loaded causal model; it computes only the logits that are scored.

Requests with the same context (the choices of an item) share its computation through the KV cache, and no request is scored
twice. Answers are written by greedy decoding (``replaceme.evaluation.greedy``). A batch holds contexts of one length, the
longest first, so that no padding enters an attention; continuations are padded after the text. Processes share the batches
(``replaceme.base.group``), and each gets all scores; what lm-eval's own class computes, each of them computes whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch.nn.functional import log_softmax

from replaceme.base.compute import free_memory
from replaceme.base.errors import DatasetError, ModelError
from replaceme.base.group import all_gather, all_reduce_sum, shard
from replaceme.base.progress import progress
from replaceme.evaluation.greedy import continuations
from replaceme.evaluation.perplexity import WINDOW
from replaceme.evaluation.requests import Encodings
from replaceme.models.interleaving import interleave_forwards
from replaceme.models.kv_cache import cache_arguments, cache_bytes_per_token, filled_cache, shares_contexts
from replaceme.models.model import positions_of
from replaceme.models.streaming import stream_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Request = tuple[tuple[str, str], list[int], list[int]]
Ids = tuple[int, ...]
Score = tuple[float, bool]
ROWS_OF_CACHE = 8
# The options of greedy decoding, and lm-eval's number of tokens for a task that doesn't say.
GREEDY, GENERATED = {"do_sample", "temperature", "until", "max_gen_toks"}, 256


class CausalScorer(TemplateLM):
    """Scores the requests of lm-eval's tasks with one model."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, description: str, encodings: Encodings
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.description = model, tokenizer, description
        self.batch_tokens, self.encodings = batch_size * WINDOW, encodings
        self.shares = shares_contexts(model)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        # Stands for an empty context; lm-eval's choice, even if the tokenizer puts nothing before a text.
        for start in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if start is not None:
                return int(start)
        raise ModelError("model_path: the tokenizer has neither a bos nor an eos token, which an empty context needs.")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False, verbose=False)
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.encodings.pair(context, continuation, super()._encode_pair)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[Score]:
        # The library's progress bar is over tokenization; ours is over the passes, which take the time.
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **_options: Any) -> list[Score]:
        longest = positions_of(self.model.config)
        wanted: dict[Ids, dict[Ids, None]] = defaultdict(dict)  # context → its distinct continuations
        keys: list[tuple[Ids, Ids]] = []
        for (_, text), context, continuation in requests:
            if not continuation:
                raise DatasetError(
                    f"tasks: the answer {text!r} of an item has no tokens, so it has no likelihood; give it a text."
                )
            # The last token of the continuation is not fed to the model, so one more token fits.
            kept = tuple(continuation[-longest:])
            keys.append((tuple(context[-max(1, longest - len(kept) + 1) :]), kept))
            wanted[keys[-1][0]][kept] = None
        results: dict[tuple[Ids, Ids], Score] = {}

        def score(contexts: list[Ids]) -> None:
            rows, pairs = zip(
                *((row, (context, tail)) for row, context in enumerate(contexts) for tail in wanted[context]), strict=True
            )
            results.update(zip(pairs, self._score(contexts, rows, [tail for _, tail in pairs]), strict=True))

        batches = self._batches(wanted)[shard().rank :: shard().size]
        passes = interleave_forwards(self.model, (partial(score, contexts) for contexts in batches), self._side_by_side())
        for _ in progress(passes, self.description, "batches", len(batches)):
            pass
        # What other processes have scored is zero here.
        pairs = [(context, tail) for context, tails in wanted.items() for tail in tails]
        table = torch.tensor([results.get(pair, (0.0, False)) for pair in pairs], dtype=torch.float64)
        all_reduce_sum({"scores": table})
        whole = {pair: (likelihood, bool(best)) for pair, (likelihood, best) in zip(pairs, table.tolist(), strict=True)}
        return [whole[key] for key in keys]

    def _side_by_side(self) -> int:
        """Return how many batches' caches fit into half of the free memory, for a streamed model; a resident one takes one."""
        if stream_of(self.model) is None:
            return 1
        size = (cache_bytes_per_token(self.model) or 0) * ROWS_OF_CACHE * self.batch_tokens
        return free_memory(str(self.model.device)) // (2 * size) if size else 1

    def _batches(self, wanted: Mapping[Ids, Iterable[Ids]]) -> list[list[Ids]]:
        """Group contexts of equal length, the longest first, into batches of at most about ``batch_tokens`` tokens."""
        batches: list[list[Ids]] = []
        filled = rows = 0
        # Contexts with similar numbers and lengths of continuations come together, to need little padding.
        order = sorted(wanted, key=lambda context: (len(context), len(list(wanted[context])), max(map(len, wanted[context]))))
        for context in reversed(order):
            tails = list(map(len, wanted[context]))
            cost = len(context) + sum(tails)
            # Each choice has its own copy of the context's cache; a cached token takes less memory than a computed one.
            kept = (rows + len(tails)) * (len(context) + max(tails)) / ROWS_OF_CACHE
            if not batches or len(batches[-1][0]) != len(context) or max(filled + cost, kept) > self.batch_tokens:
                batches.append([])
                filled = rows = 0
            batches[-1].append(context)
            filled += cost
            rows += len(tails)
        return batches

    def _score(self, contexts: Sequence[Ids], rows: Sequence[int], continuations: Sequence[Ids]) -> list[Score]:
        """Score continuations, each after the context at its row; all contexts have the same length."""
        device, cache = self.model.device, None
        # The last token of the context predicts the first of the continuation. Padding comes after the text.
        tails = [torch.tensor([contexts[row][-1], *tail[:-1]]) for row, tail in zip(rows, continuations, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(tails, batch_first=True).to(device)
        scored = ids.shape[1]
        prefixes = torch.tensor([context[:-1] for context in contexts], device=device, dtype=torch.long)
        if prefixes.shape[1] and (len(rows) == len(contexts) or not self.shares):
            ids = torch.cat([prefixes[list(rows)], ids], dim=1)  # nothing to share: one pass
        elif prefixes.shape[1]:
            cache = filled_cache(self.model, prefixes)
            cache.batch_select_indices(torch.tensor(rows))  # on the CPU: each layer may be on another device
        logits = self.model(ids, logits_to_keep=scored, **cache_arguments(self.model, cache)).logits
        scores = []
        for row, tail in zip(logits, continuations, strict=True):
            predictions = log_softmax(row[: len(tail)].float(), dim=-1)
            target = torch.tensor(tail, device=device)
            likelihood = predictions.gather(1, target[:, None]).sum()
            scores.append((float(likelihood), bool((predictions.argmax(-1) == target).all())))
        return scores

    @cached_property
    def _library(self) -> Any:
        """lm-eval's own model class, for sampled answers and lm-eval's perplexity tasks, which gain nothing from this class."""
        from lm_eval.models.huggingface import HFLM

        batch_size = self.batch_tokens // WINDOW
        return HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=batch_size, max_length=None)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        with _counted(f"{self.description}: windows", "windows", count()):
            scores: list[float] = self._library.loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return scores

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        asked = [request.args for request in requests]
        options = [normalize_gen_kwargs(given, GENERATED) for _, given in asked]
        if any(wanted["do_sample"] or wanted.keys() - GREEDY for wanted in options):
            with _counted(f"{self.description}: generated answers", "answers", range(len(requests))):
                texts: list[str] = self._library.generate_until(requests, disable_tqdm=disable_tqdm)
            return texts
        longest = positions_of(self.model.config)
        batches: dict[tuple[int, str], list[int]] = defaultdict(list)
        contexts = []
        for number, ((text, _), wanted) in enumerate(zip(asked, options, strict=True)):
            ids, _ = self.encodings.pair(text, "", lambda context, _: (self.tok_encode(context), []))
            contexts.append((ids or [self.prefix_token_id])[-max(1, longest - wanted["max_gen_toks"]) :])
            batches[len(contexts[-1]), str(wanted)].append(number)
        answers: dict[int, str] = {}
        parts = self._split(batches, options)[shard().rank :: shard().size]
        for numbers in progress(parts, f"{self.description}: answers", "batches"):
            length, until = options[numbers[0]]["max_gen_toks"], options[numbers[0]]["until"]
            written = continuations(self.model, self.tokenizer, [contexts[number] for number in numbers], length, until)
            answers |= zip(numbers, written, strict=True)
        whole = {number: text for part in all_gather([*answers.items()]) for number, text in part}
        return [whole[number] for number in range(len(asked))]

    def _split(self, batches: Mapping[tuple[int, str], Sequence[int]], options: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Split requests of one length and kind into batches of about ``batch_tokens`` tokens, the longest first."""
        parts = []
        for (length, _), numbers in sorted(batches.items(), reverse=True):
            rows = max(1, self.batch_tokens // (length + options[numbers[0]]["max_gen_toks"]))
            parts += [[*numbers[start : start + rows]] for start in range(0, len(numbers), rows)]
        return parts


@contextmanager
def _counted(description: str, unit: str, ticks: Iterable[int]) -> Iterator[None]:
    """Show the progress of lm-eval's own model class in our way; by itself, it begins a new bar with each batch."""
    from lm_eval.models import huggingface

    steps = progress(ticks, description, unit)

    def bar(items: Any = None, **_options: Any) -> Any:
        return SimpleNamespace(update=lambda _: next(steps, None), close=lambda: None) if items is None else items

    with mock.patch.object(huggingface, "tqdm", bar):
        yield
