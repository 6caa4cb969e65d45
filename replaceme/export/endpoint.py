"""Read what a server with OpenAI's interface tells of its model, to compare it with the reference.

Servers tell different things. vLLM gives log-probabilities of the prompt (``echo``); llama.cpp's server only those of what
it generates, and refuses ``echo``; llama-cpp-python's pairs each token of an echoed prompt with the scores after it, so that
those are left out; `transformers serve` gives the text alone. Where there is ``/tokenize`` beside ``/v1``, or
``/extras/tokenize``, it gives the ids. The number of a chat's tokens is in ``usage``.
"""

import json
import math
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from replaceme.base.errors import ParameterError, excerpt
from replaceme.export.reference import CHAT, GENERATED, PROMPTS, STRINGS, Continuation, Readings

SECONDS = 120


def read_endpoint(url: str, reference: Readings, name: str | None = None) -> Readings:
    """Return what the server at ``url``, which ends in ``/v1``, tells of the reference's texts.

    ``name`` is the model's name there; None is the first that ``/models`` lists. Raises ParameterError if the server can't be
    reached, or completes no text.
    """
    url = url.rstrip("/")
    models = _call(f"{url}/models") or {}
    name = name or next((str(each["id"]) for each in models.get("data") or []), "default")
    ids = [_tokenize(url.removesuffix("/v1"), name, text) for text in (*PROMPTS, *STRINGS)]
    logprobs: list[list[float] | None] = []
    firsts: list[float | None] = []
    echo = True
    for prompt, own in zip(PROMPTS, reference.ids, strict=False):
        _, values, generated = _complete(url, name, prompt, 1, echo)
        count = len(values) - generated
        if count and count != len(own or []):
            echo, count = False, 0
            _, values, _ = _complete(url, name, prompt, 1)
        logprobs.append(values[1:count] or None)
        firsts.append(values[count] if count < len(values) else None)
    continuations = []
    for each in reference.continuations:
        text, values, _ = _complete(url, name, each.start, GENERATED)
        continuations.append(Continuation(each.start, text, values, each.start_ids))
    chat = _call(f"{url}/chat/completions", {"model": name, "messages": CHAT, "max_tokens": 1, "temperature": 0})
    tokens = ((chat or {}).get("usage") or {}).get("prompt_tokens")
    return Readings(ids, logprobs, firsts, continuations, chat_tokens=tokens)


def _tokenize(root: str, name: str, text: str) -> list[int] | None:
    """Return the ids of a text; None if the server doesn't give them."""
    # vLLM, llama.cpp and llama-cpp-python have other names for the same.
    options = {"model": name, "prompt": text, "content": text, "input": text, "add_special_tokens": True, "add_special": True}
    answers = (_call(root + path, options) for path in ("/tokenize", "/extras/tokenize"))
    return next((answer.get("tokens") for answer in answers if answer), None)


def _complete(url: str, name: str, prompt: str, tokens: int, echo: bool = False) -> tuple[str, list[float], int]:
    """Return the text that follows a prompt, the log-probabilities that are given, and how many of them are generated tokens'.

    With ``echo``, and a server that knows it, those of the prompt come first; NaN stands for the first token's.
    """
    body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    # Other defaults may stand in the model's generation_config.json.
    extra = {"logprobs": 1, "repetition_penalty": 1.0}
    answer = (_call(f"{url}/completions", {**body, **extra, "echo": True}) if echo else None) or (
        _call(f"{url}/completions", {**body, **extra}) or _call(f"{url}/completions", body)
    )
    if not answer or not answer.get("choices"):
        raise ParameterError(
            f"--endpoint: {excerpt(url, 100)} completes no text (POST /completions); start a server that does."
        )
    choice = answer["choices"][0]
    told = choice.get("logprobs") or {}
    values = told.get("token_logprobs") or [each.get("logprob") for each in told.get("content") or []]
    is_echoed, usage = bool(values) and values[0] is None, answer.get("usage") or {}
    generated = int(usage.get("completion_tokens", tokens)) if is_echoed else len(values)
    values = [math.nan if value is None else float(value) for value in values]
    return str(choice.get("text", "")).removeprefix(prompt if echo else ""), values, generated


def _call(url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return a server's answer, an object; None if it refuses the request.

    Raises:
        ParameterError: it can't be reached, or isn't an address.
    """
    try:
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=SECONDS) as answer:
            content = json.load(answer)
    except HTTPError:
        return None
    except (URLError, HTTPException, OSError, ValueError) as failure:
        reason = excerpt(getattr(failure, "reason", failure), 100)
        raise ParameterError(
            f"--endpoint: {excerpt(url, 100)} gives no answer ({reason}); give http://host:port/v1."
        ) from failure
    return content if isinstance(content, dict) else None
