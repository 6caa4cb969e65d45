"""Compare what a served model computes with the reference of the model that was proved (``replaceme.export.reference``).

The measure is |Δ log p| of tokens, in nats: none but the last digits of float32 for the same weights, a little for rounded ones
(bfloat16, 8 or 4 bits), much for another model. Two causes show in where the errors are. The first token of a text attends to
itself alone, so that wrong positions (rope) change nothing there, and all that follows; and the states say which layer is the
first to compute something else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from replaceme.export.reference import PROMPTS, STRINGS, Continuation, Readings

# Mean |Δ log p| in nats: up to the first, the same computation in another order; up to the second, weights rounded to 8 bits or
# more. The demo without 4 layers: 0.05 in bfloat16, 0.1 with 8 bits a weight; 0.16 with a rotary base of 10,000 for 100,000.
EQUAL, ROUNDED = 1e-3, 0.15
# A layer that computes something else: the relative error of the state that enters it, at most, and of the one that leaves it.
ENTERS, LEAVES = 0.05, 0.25
# Where positions are wrong, the error at the first token is less than this share of the later ones'.
FIRST_SHARE = 0.1


@dataclass(frozen=True)
class Verdict:
    """Whether a model is the one that was proved: a word for it, what is wrong, the figures, and what could not be compared."""

    verdict: str
    wrong: list[str]
    figures: list[str]
    unseen: list[str]

    @property
    def is_same(self) -> bool:
        return not self.wrong

    def lines(self) -> list[str]:
        """Return the verdict in lines."""
        wrong, unseen = [f"wrong: {each}" for each in self.wrong], [f"not compared: {each}" for each in self.unseen]
        return [self.verdict, *wrong, *self.figures, *unseen]


def compare_readings(reference: Readings, served: Readings) -> Verdict:
    """Compare a served model's readings, as far as there are any, with the reference."""
    errors = [*_list_errors(reference, served)]
    wrong, figures, unseen = _compare_text(reference, served)
    mean = fmean(error for _, error in errors) if errors else None
    same = _count_equal(reference.continuations, served.continuations)
    if errors:
        largest = max(error for _, error in errors)
        figures.append(f"log-probabilities of {len(errors)} tokens: mean difference {mean:.2g} nats, largest {largest:.2g}")
    else:
        unseen.append("log-probabilities: none are given")
    if served.continuations:
        figures.append(f"greedy continuations: {same} of {len(reference.continuations)} are the same text")
    if (mean or 0) > EQUAL and (cause := _find_cause(reference, served, errors)):
        wrong.append(cause)
    elif mean is not None and not mean <= ROUNDED:  # NaN too
        wrong.append(f"weights: they differ by {mean:.2g} nats a token, more than rounding to 8 bits explains")
    elif mean is None and served.continuations and 2 * same < len(reference.continuations):
        wrong.append("weights: most continuations are another model's")
    elif mean is None and not served.continuations and not wrong:
        wrong.append("nothing could be compared")
    if wrong:
        verdict = "another model"
    elif mean is None:
        verdict = "the same, as far as text alone shows it"
    else:
        verdict = "equal" if mean <= EQUAL else f"the same up to rounding ({mean:.2g} nats a token)"
    return Verdict(verdict, wrong, figures, unseen)


def _compare_text(reference: Readings, served: Readings) -> tuple[list[str], list[str], list[str]]:
    """Compare tokenizer, chat template and vocabulary; return what is wrong, what is equal, and what could not be seen."""
    wrong, figures, unseen = list[str](), list[str](), list[str]()
    seen = [
        (text, own, ids)
        for text, own, ids in zip((*PROMPTS, *STRINGS), reference.ids, served.ids, strict=True)
        if ids is not None
    ]
    if other := [text for text, own, ids in seen if own != ids]:
        wrong.append(f"tokenizer: {len(other)} of {len(seen)} texts have other ids, the first is {other[0][:40]!r}")
    elif seen:
        figures.append(f"tokenizer: the same ids of {len(seen)} texts")
    else:
        unseen.append("tokenizer: no ids are given")
    if reference.chat is None or (served.chat_tokens is None and served.chat is None):
        if reference.chat is not None and served.states is not None:
            wrong.append("template: there is none, or it refuses the chat")
        elif reference.chat is not None:
            unseen.append("template: the number of the chat's tokens is not given")
    elif served.chat is not None and served.chat != reference.chat:
        wrong.append(f"template: the chat is {served.chat[:60]!r}…, not {reference.chat[:60]!r}…")
    elif served.chat_tokens != reference.chat_tokens and not other:
        wrong.append(f"template: the chat has {served.chat_tokens} tokens, not {reference.chat_tokens}")
    else:
        figures.append("template: the same chat" if served.chat is not None else "template: as many tokens of the chat")
    if served.rows not in (None, reference.rows):
        wrong.append(f"vocabulary: the embedding has {served.rows} rows, not {reference.rows}")
    elif served.rows is None:
        unseen.append("vocabulary: its size is not given")
    return wrong, figures, unseen


def _list_errors(reference: Readings, served: Readings) -> Iterator[tuple[int, float]]:
    """Yield for each log-probability that both have the number of tokens before it, and the absolute difference."""
    for own, theirs in zip(reference.logprobs, served.logprobs, strict=False):
        if own and theirs and len(own) == len(theirs):
            yield from ((at + 1, abs(a - b)) for at, (a, b) in enumerate(zip(own, theirs, strict=True)))
    for ids, first, other in zip(reference.ids, reference.firsts, served.firsts, strict=False):
        if first is not None and other is not None:
            yield len(ids or []), abs(first - other)
    for own_text, their_text in zip(reference.continuations, served.continuations, strict=False):
        # The first is that of the most likely token, whichever it is; what follows another token can't be compared.
        count = None if own_text.text == their_text.text else 1
        pairs = zip(own_text.logprobs[:count], their_text.logprobs[:count], strict=False)
        yield from ((len(own_text.start_ids) + at, abs(a - b)) for at, (a, b) in enumerate(pairs))


def _count_equal(own: Sequence[Continuation], theirs: Sequence[Continuation]) -> int:
    return sum(a.text.strip() == b.text.strip() for a, b in zip(own, theirs, strict=False))


def _find_cause(reference: Readings, served: Readings, errors: Sequence[tuple[int, float]]) -> str | None:
    """Return what makes the log-probabilities differ, if that shows and is no rounding."""
    own, theirs = reference.states, served.states
    relative: list[float] = []
    if own is not None and theirs is not None:
        if len(own) != len(theirs):
            return f"layers: there are {len(theirs) - 1}, not {len(own) - 1}"
        if own.shape != theirs.shape:
            return "layers: their width is another"
        relative = ((theirs - own).norm(dim=-1) / own.norm(dim=-1)).tolist()
    first = [error for before, error in errors if before == 1]
    later = fmean([error for before, error in errors if before > 1] or [0.0])
    # Wrong positions show from the first layer on.
    if first and later > EQUAL and fmean(first) < FIRST_SHARE * later and not (relative and relative[1] <= EQUAL):
        what = "positions (rope)" if relative else "positions (rope), or layers"
        return f"{what}: the first token of each text agrees, and what follows does not"
    for layer, (before, after) in enumerate(pairwise(relative[:-1])):
        if before <= ENTERS and not after <= LEAVES:
            return f"layers: layer {layer} is the first that computes something else"
    return None
