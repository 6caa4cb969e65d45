"""Read what llama.cpp or OpenVINO computes from a converted model, to compare it with the reference.

Each is asked for the logits of given token ids, and for the ids of a text; the rest of the readings follows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from replaceme.export.reference import GENERATED, PROMPTS, STRINGS, Continuation, Readings
from replaceme.running.extras import require_package

OPENVINO_MODEL = "openvino_model.xml"


def is_converted(path: Path) -> bool:
    """Return whether a path is a GGUF file, or the folder of an OpenVINO model."""
    return path.suffix == ".gguf" or (path / OPENVINO_MODEL).is_file()


def read_converted(path: Path, reference: Readings) -> Readings:
    """Compute the readings of a converted model; ResourceError if its runtime is not installed."""
    return _read_gguf(path, reference) if path.suffix == ".gguf" else _read_openvino(path, reference)


def _read_gguf(path: Path, reference: Readings) -> Readings:
    require_package("llama_cpp", path.name)
    import llama_cpp

    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # the cache is float16 by default
    length = GENERATED + max(len(ids or []) for ids in reference.ids)
    model = llama_cpp.Llama(str(path), n_ctx=length, logits_all=True, verbose=False, **exact)

    def logits(ids: Sequence[int]) -> Tensor:
        model.reset()
        model.eval(ids)
        return torch.from_numpy(model.scores[: len(ids)])

    return _read(
        lambda text: model.tokenize(text.encode(), special=True), lambda ids: model.detokenize(ids).decode(errors="replace"),
        logits, reference,
    )  # fmt: skip


def _read_openvino(path: Path, reference: Readings) -> Readings:
    require_package("openvino", path.name)
    import openvino
    from transformers import AutoTokenizer

    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # where the processor has bfloat16, that is the default
    request = openvino.Core().compile_model(path / OPENVINO_MODEL, "CPU", exact).create_infer_request()
    tokenizer = AutoTokenizer.from_pretrained(path)
    names = {name for each in request.model_inputs for name in each.names}

    def logits(ids: Sequence[int]) -> Tensor:
        request.reset_state()
        row, at, beam = torch.tensor([ids]), torch.arange(len(ids))[None], torch.zeros(1, dtype=torch.int32)
        inputs = {"input_ids": row, "attention_mask": torch.ones_like(row), "position_ids": at, "beam_idx": beam}
        answer = request.infer({name: value.numpy() for name, value in inputs.items() if name in names})
        return torch.from_numpy(answer["logits"][0].copy())

    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return _read(lambda text: list(tokenizer(text).input_ids), decode, logits, reference)


def _read(
    encode: Callable[[str], list[int]], decode: Callable[[list[int]], str],
    logits: Callable[[Sequence[int]], Tensor], reference: Readings,
) -> Readings:  # fmt: skip
    """Return the readings of a model, given its tokenizer and its logits, (ids, vocabulary), of token ids."""
    logprobs, firsts, rows = list[list[float] | None](), list[float | None](), None
    for ids in (each or [] for each in reference.ids[: len(PROMPTS)]):
        scores = logits(ids).float().log_softmax(-1)
        logprobs.append(scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist())
        firsts.append(scores[-1].max().item())
        rows = scores.shape[-1]
    continuations = []
    for each in reference.continuations:
        ids, values = [*each.start_ids], list[float]()
        for _ in each.logprobs:
            value, token = logits(ids).float().log_softmax(-1)[-1].max(-1)
            ids.append(int(token))
            values.append(value.item())
        continuations.append(Continuation(each.start, decode(ids[len(each.start_ids) :]), values, each.start_ids))
    return Readings([encode(text) for text in (*PROMPTS, *STRINGS)], logprobs, firsts, continuations, rows=rows)
