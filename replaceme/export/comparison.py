"""Compare what a served model computes with the reference of the model that was proved (``replaceme.export.reference``).

The measure is |Δ log p| of tokens, in nats: none but the last digits of float32 for the same weights, a little for rounded ones
(bfloat16, 8 or 4 bits), much for another model. Two causes show in where the errors are. The first token of a text attends to
itself alone, so that wrong positions (rope) change nothing there, and all that follows; and the states say which layer is the
first to compute something else.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean

from replaceme.export.reference import PROMPTS, STRINGS, Readings

# Mean |Δ log p| in nats: up to the first, the same computation in another order; up to the second, weights rounded to 8 bits or
# more. The demo without 4 layers: 0.05 in bfloat16, 0.1 with 8 bits a weight; 0.16 with a rotary base of 10,000 for 100,000.
EQUAL, ROUNDED = 1e-3, 0.15
# Odd strings whose ids may be others: llama.cpp splits fractions before other signs, for example.
ODD = 2
# A layer that computes something else: the relative error of the state that enters it, at most, and of the one that leaves it.
ENTERS, LEAVES = 0.05, 0.25
# Where positions are wrong, the error at the first token is less than this share of the later ones'.
FIRST_SHARE = 0.1


def compare_readings(reference: Readings, served: Readings) -> tuple[bool, list[str]]:
    """Return whether a served model is the same up to rounding; and verdict, what is wrong, figures, and what was not seen."""
    errors, wrong, figures, unseen = [*_list_errors(reference, served)], list[str](), list[str](), list[str]()
    odd = _compare_tokenizer(reference, served, wrong, figures, unseen)
    own, theirs = reference.continuations, served.continuations
    same = sum(a.text.strip() == b.text.strip() for a, b in zip(own, theirs, strict=False))
    if theirs:
        figures.append(f"greedy continuations: {same} of {len(own)} are the same text")
    if errors:
        mean, largest = fmean(error for _, error in errors), max(error for _, error in errors)
        figures.append(f"log-probabilities of {len(errors)} tokens: mean difference {mean:.2g} nats, largest {largest:.2g}")
        if not any(served.logprobs):
            unseen.append("log-probabilities of the prompts: those of generated tokens alone are given")
        verdict = "equal" if mean <= EQUAL else f"the same up to rounding ({mean:.2g} nats a token)"
        if cause := _find_cause(reference, served, errors) if mean > EQUAL else None:
            wrong.append(cause)
        elif not mean <= ROUNDED:  # NaN too
            wrong.append(f"weights: they differ by {mean:.2g} nats a token, more than rounding to 8 bits explains")
    else:
        verdict = "the same, as far as text alone shows it"
        unseen.append("log-probabilities: none are given")
        if 2 * same < len(own) or not theirs:
            wrong.append("weights: most continuations are another model's" if theirs else "nothing could be compared")
    lines = [*(f"wrong: {each}" for each in wrong), *figures, *(f"not compared: {each}" for each in unseen)]
    return not wrong, ["another model" if wrong else verdict + odd, *lines]


def _compare_tokenizer(reference: Readings, served: Readings, wrong: list[str], figures: list[str], unseen: list[str]) -> str:
    """Compare ids, template and vocabulary: add to wrong, equal and unseen; return what the verdict says of odd strings."""
    texts = [*zip((*PROMPTS, *STRINGS), reference.ids, served.ids, strict=True)]
    seen = [(text, own == ids) for text, own, ids in texts if ids is not None]
    other = [text for text, is_same in seen if not is_same]
    is_odd = len(other) <= ODD and not {*other} & {*PROMPTS}
    if other:
        differing = f"{len(other)} of {len(seen)} texts have other ids, the first is {other[0][:40]!r}"
        (figures if is_odd else wrong).append(f"tokenizer: {differing}")
    elif seen:
        figures.append(f"tokenizer: the same ids of {len(seen)} texts")
    else:
        unseen.append("tokenizer: no ids are given")
    chat, tokens = served.chat, served.chat_tokens
    if chat is not None and chat != reference.chat:
        wrong.append(f"template: the chat is {chat[:60]!r}…, not {(reference.chat or '')[:60]!r}…")
    elif tokens is not None and tokens != reference.chat_tokens and (is_odd or not other):
        wrong.append(f"template: the chat has {tokens} tokens, not {reference.chat_tokens}")
    elif tokens is not None:
        figures.append("template: the same chat" if chat is not None else "template: as many tokens of the chat")
    elif reference.chat is not None:
        # A folder has none then, or one that refuses the chat.
        (unseen if served.states is None else wrong).append("template: it gives no number of the chat's tokens")
    if served.rows is None:
        unseen.append("vocabulary: its size is not given")
    elif served.rows != reference.rows:
        wrong.append(f"vocabulary: the embedding has {served.rows} rows, not {reference.rows}")
    return ", but for the ids of odd strings" if other and is_odd else ""


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
