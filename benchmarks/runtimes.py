"""A model loaded by one runtime: run in that runtime's environment, as a process of its own, by ``benchmarks.serving``.

``ENV/bin/python benchmarks/runtimes.py RUNTIME PACKAGE PATH WEIGHTS IDS`` prints the package's version and the perplexity of
the ids, a JSON list, in one window; then, for each line of its input, the tokens a second of a greedy text after the first of
them.
"""

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT, GENERATED, THREADS = 16, 16, 1
# Log p of each token of a text but the first, and generating so many tokens after a text.
Loaded = tuple[Callable[[list[int]], Sequence[float]], Callable[[list[int], int], object]]


def load_transformers(path: str, weights: str) -> Loaded:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=weights).eval()

    def score(ids: list[int]) -> list[float]:
        with torch.inference_mode():
            scores = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        return list(scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())

    return score, lambda ids, count: model.generate(
        torch.tensor([ids]), min_new_tokens=count, max_new_tokens=count, do_sample=False
    )


def load_vllm(path: str, weights: str) -> Loaded:
    from vllm import LLM, SamplingParams

    model = LLM(path, dtype=weights, enforce_eager=True, max_model_len=2048, enable_prefix_caching=False)

    def ask(ids: list[int], count: int, **options: Any) -> Any:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **options)
        return model.generate({"prompt_token_ids": ids}, params, use_tqdm=False)[0]

    def score(ids: list[int]) -> list[float]:
        told = ask(ids, 1, prompt_logprobs=0).prompt_logprobs[1:]
        return [each[token].logprob for each, token in zip(told, ids[1:], strict=True)]

    return score, ask


def load_llama_cpp(path: str, weights: str) -> Loaded:
    from llama_cpp import Llama

    model = Llama(path, n_ctx=2048, n_threads=THREADS, n_threads_batch=THREADS, logits_all=True, verbose=False)

    def score(ids: list[int]) -> list[float]:
        model.reset()
        model.eval(ids)
        return pick(model.scores, ids)

    def generate(ids: list[int], count: int) -> None:
        for _ in zip(range(count), model.generate(ids, temp=0.0, reset=True), strict=False):
            pass

    return score, generate


def load_openvino(path: str, weights: str) -> Loaded:
    import numpy
    import openvino
    from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig

    model = ContinuousBatchingPipeline(path, SchedulerConfig(), "CPU", {"INFERENCE_NUM_THREADS": THREADS})

    def ask(ids: list[int], count: int, **options: Any) -> Any:
        config = GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False, **options)
        request = model.add_request(0, openvino.Tensor(numpy.array([ids], dtype=numpy.int64)), config)
        while model.has_non_finished_requests():
            model.step()
        return request.read_all()[0]

    return lambda ids: ask(ids, 1, echo=True, logprobs=1).generated_log_probs[1 : len(ids)], ask


def load_onnxruntime(path: str, weights: str) -> Loaded:
    import onnxruntime_genai as genai

    config = genai.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    model = genai.Model(config)

    def start(ids: list[int], length: int) -> Any:
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(ids)
        return generator

    def generate(ids: list[int], count: int) -> None:
        generator = start(ids, len(ids) + count)
        for _ in range(count):
            generator.generate_next_token()

    return lambda ids: pick(start(ids, len(ids) + 1).get_output("logits")[0], ids), generate


def load_ctranslate2(path: str, weights: str) -> Loaded:
    import ctranslate2

    model = ctranslate2.Generator(path, "cpu", inter_threads=1, intra_threads=THREADS, compute_type=weights)
    names = json.loads((Path(path) / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(ids: list[int], count: int) -> object:
        # Its forms of the tokens; no end of text comes before ``min_length``.
        tokens = [[names[each] for each in ids]]
        return model.generate_batch(tokens, max_length=count, min_length=count, include_prompt_in_result=False)

    return lambda ids: model.score_batch([[names[each] for each in ids]])[0].log_probs, generate


def pick(logits: Any, ids: list[int]) -> list[float]:
    """Return log p of each token but the first, given the logits, (tokens, vocabulary), a numpy array."""
    import numpy

    rows = logits[: len(ids) - 1].astype(numpy.float64)
    top = rows.max(-1)
    return list(rows[range(len(rows)), ids[1:]] - top - numpy.log(numpy.exp(rows - top[:, None]).sum(-1)))


def answer(runtime: str, package: str, path: str, weights: str, text: str) -> None:
    """Load a model, tell version and perplexity, then the tokens a second for each line of input."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the runtimes print
    ids = json.loads(text)
    score, generate = globals()[f"load_{runtime.replace('.', '_')}"](path, weights)
    perplexity = math.exp(-statistics.fmean(score(ids)))
    print(json.dumps([version(package), perplexity]), file=told, flush=True)
    for _ in sys.stdin:
        began = time.monotonic()
        generate(ids[:PROMPT], GENERATED)
        print(json.dumps(GENERATED / (time.monotonic() - began)), file=told, flush=True)


if __name__ == "__main__":
    answer(*sys.argv[1:])
