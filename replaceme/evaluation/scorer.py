"""lm-eval's interface to a loaded causal model; it computes only the logits that are scored.

Requests with the same context (the choices of an item) share its computation through the KV cache, and no request is scored
twice. Padding comes after the text, so that none enters an attention; contexts that several continuations share have one length
in a batch. Processes share the batches (``replaceme.base.group``), and each gets all scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.functional import log_softmax

from replaceme.base.accelerators import to_device
from replaceme.base.errors import DatasetError, ModelError
from replaceme.base.group import all_gather, all_reduce_sum, shard
from replaceme.base.progress import progress
from replaceme.evaluation.continuations import write_continuations
from replaceme.evaluation.windows import WINDOW
from replaceme.models.devices import free_memory
from replaceme.models.interleaving import interleave_forwards
from replaceme.models.kv_cache import cache_arguments, cache_bytes_per_token, fill_cache, shares_contexts
from replaceme.models.model import positions_of
from replaceme.models.streaming import stream_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Request = tuple[tuple[str, str], list[int], list[int]]
Ids = tuple[int, ...]
Score = tuple[float, bool]
# Tokens that a batch's caches may hold, for each token that it may compute: a cached one takes less memory.
CACHED_PER_COMPUTED = 8
# lm-eval's number of tokens for a task that doesn't say how many it generates.
DEFAULT_MAX_TOKENS = 256


class CausalScorer(TemplateLM):
    """Scores the requests of lm-eval's tasks with one model."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, description: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.description = model, tokenizer, description
        self.positions, self.batch_tokens = positions_of(model.config), batch_size * WINDOW
        self.shares_contexts = shares_contexts(model)

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
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False, verbose=False)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[Score]:
        # The library's progress bar is over tokenization; ours is over the passes, which take the time.
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, by lm-eval's windows: as long as the model takes, without overlap."""
        windows, numbers = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.positions, context_len=1):
                windows.append((("", ""), *make_disjoint_window(window)))
                numbers.append(number)
        totals = [0.0] * len(requests)
        for number, (likelihood, _) in zip(numbers, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += likelihood
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **_options: Any) -> list[Score]:
        tails: dict[Ids, dict[Ids, None]] = defaultdict(dict)  # context → its distinct continuations
        keys: list[tuple[Ids, Ids]] = []
        for (_, text), context, continuation in requests:
            if not continuation:
                raise DatasetError(
                    f"tasks: the answer {text!r} of an item has no tokens, so it has no likelihood; give it a text."
                )
            # The last token of the continuation is not fed to the model, so one more token fits.
            tail = tuple(continuation[-self.positions :])
            keys.append((tuple(context[-max(1, self.positions - len(tail) + 1) :]), tail))
            tails[keys[-1][0]][tail] = None

        def score(contexts: list[Ids]) -> dict[tuple[Ids, Ids], Score]:
            pairs = [(row, context, tail) for row, context in enumerate(contexts) for tail in tails[context]]
            likelihoods = self._score_batch(contexts, [row for row, _, _ in pairs], [tail for _, _, tail in pairs])
            return dict(zip([pair[1:] for pair in pairs], likelihoods, strict=True))

        batches = self._group_contexts(tails)[shard().rank :: shard().size]
        passes = interleave_forwards(
            self.model, (partial(score, contexts) for contexts in batches), self._count_batches_in_memory()
        )
        scores: dict[tuple[Ids, Ids], Score] = {}
        for part in progress(passes, self.description, "batches", len(batches)):
            scores |= part
        # What other processes have scored is zero here.
        pairs = [(context, tail) for context in tails for tail in tails[context]]
        table = torch.tensor([scores.get(pair, (0.0, False)) for pair in pairs], dtype=torch.float64)
        all_reduce_sum({"scores": table})
        scores = {pair: (likelihood, bool(best)) for pair, (likelihood, best) in zip(pairs, table.tolist(), strict=True)}
        return [scores[key] for key in keys]

    def _count_batches_in_memory(self) -> int:
        """Return how many batches' caches fit into half of the free memory, for a streamed model; a resident one takes one."""
        if stream_of(self.model) is None:
            return 1
        size = (cache_bytes_per_token(self.model) or 0) * CACHED_PER_COMPUTED * self.batch_tokens
        return free_memory(str(self.model.device)) // (2 * size) if size else 1

    def _group_contexts(self, tails: Mapping[Ids, Collection[Ids]]) -> list[list[Ids]]:
        """Group contexts, the longest first, into batches of at most about ``batch_tokens`` tokens; shared ones by length."""
        batches: list[list[Ids]] = []
        computed = rows = 0
        # Contexts with similar numbers and lengths of continuations come together, to need little padding.
        order = sorted(
            tails,
            key=lambda context: (len(tails[context]) > 1, len(context), len(tails[context]), max(map(len, tails[context]))),
        )
        for context in reversed(order):
            lengths = [*map(len, tails[context])]
            cost = len(context) + sum(lengths)
            # Each choice has its own copy of the context's cache.
            cached = (rows + len(lengths)) * (len(context) + max(lengths)) / CACHED_PER_COMPUTED
            first = batches[-1][0] if batches else None
            together = first and (len(first) == len(context) or len(tails[first]) == len(tails[context]) == 1)
            if not together or max(computed + cost, cached) > self.batch_tokens:
                batches.append([])
                computed = rows = 0
            batches[-1].append(context)
            computed += cost
            rows += len(lengths)
        return batches

    def _score_batch(self, contexts: Sequence[Ids], rows: Sequence[int], continuations: Sequence[Ids]) -> list[Score]:
        """Score continuations, each after the context at its row; if rows share a context, all have the same length."""
        device, cache = self.model.device, None
        first = min(map(len, contexts)) - 1
        if len(rows) == len(contexts) or not first or not self.shares_contexts:
            # Nothing to share: one pass.
            texts = [contexts[row] + tail[:-1] for row, tail in zip(rows, continuations, strict=True)]
        else:
            cache = fill_cache(self.model, torch.tensor([context[:-1] for context in contexts], device=device))
            cache.batch_select_indices(torch.tensor(rows))  # on the CPU: each layer may be on another device
            # The last token of the context predicts the first of the continuation.
            texts = [(contexts[row][-1], *tail[:-1]) for row, tail in zip(rows, continuations, strict=True)]
        # Padding comes after the text.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        ids = to_device(ids, device)
        kept = ids.shape[1] - (0 if cache else first)
        logits = self.model(ids, logits_to_keep=kept, **cache_arguments(self.model, cache)).logits
        likelihoods, best = [], []
        for row, context, tail in zip(logits, (contexts[row] for row in rows), continuations, strict=True):
            start = len(context) - 1 - first
            logs = log_softmax(row[start : start + len(tail)].float(), dim=-1)
            target = to_device(torch.tensor(tail), device)
            likelihoods.append(logs.gather(1, target[:, None]).sum())
            best.append((logs.argmax(-1) == target).all())
        # Read at once: each reading of a device waits for it.
        return [*zip(torch.stack(likelihoods).tolist(), torch.stack(best).tolist(), strict=True)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model writes after each question; a question that is too long loses its beginning."""
        batches: dict[tuple[int, str], list[int]] = defaultdict(list)
        questions, options = [], []
        for number, request in enumerate(requests):
            text, given = request.args
            options.append(normalize_gen_kwargs(given, DEFAULT_MAX_TOKENS))
            ids = self.tok_encode(text) or [self.prefix_token_id]
            questions.append(ids[-max(1, self.positions - options[-1]["max_gen_toks"]) :])
            batches[len(questions[-1]), str(options[-1])].append(number)
        answers: dict[int, str] = {}
        parts = [part for key in sorted(batches, reverse=True) for part in self._split_questions(key[0], batches[key], options)]
        for numbers in progress(parts[shard().rank :: shard().size], f"{self.description}: answers", "batches"):
            prompts = [questions[number] for number in numbers]
            written = write_continuations(self.model, self.tokenizer, prompts, **_convert_options(options[numbers[0]]))
            answers |= zip(numbers, written, strict=True)
        whole = {number: text for part in all_gather([*answers.items()]) for number, text in part}
        return [whole[number] for number in range(len(requests))]

    def _split_questions(self, length: int, numbers: Sequence[int], options: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Split questions of one length and kind into batches of about ``batch_tokens`` tokens."""
        rows = max(1, self.batch_tokens // (length + options[numbers[0]]["max_gen_toks"]))
        return [[*numbers[start : start + rows]] for start in range(0, len(numbers), rows)]


def _convert_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's options of a generation as ``write_continuations`` takes them."""
    sampling = {key: value for key, value in options.items() if key not in ("until", "max_gen_toks")}
    if not sampling["do_sample"] or sampling.get("temperature") == 0:
        del sampling["do_sample"]
        sampling.pop("temperature", None)
    return {"max_tokens": options["max_gen_toks"], "until": options["until"], **sampling}
