"""Commands for whoever serves a pruned model: is it the one that was proved, convert it, and chat with it and the dense one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from replaceme.base.errors import ModelError, ResourceError, VerificationError, renaming
from replaceme.base.parameters import read_params
from replaceme.base.progress import silence_libraries
from replaceme.calibration.corpus import Chat
from replaceme.running.entry import Parser, plain_parser


def make_verify_parser() -> Parser:
    """Return the parser of ``replaceme verify``."""
    description = (
        "Compare a folder, or what a server tells of its model, with the reference in a pruned model's folder, verify/.\n"
        "Exit code 0: it is the same, up to rounding. 1: it is another model."
    )
    parser = plain_parser("replaceme verify", description, "replaceme verify smaller --endpoint http://localhost:8000/v1")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the model's folder; a converted one, or a .gguf file")
    parser.add_argument("--endpoint", metavar="URL", help="a server with OpenAI's interface, which is compared instead")
    parser.add_argument("--name", help="the model's name there [the first that it lists]")
    parser.add_argument("--reference", metavar="FOLDER", type=Path, help="the pruned model that FOLDER was made from [FOLDER]")
    return parser


def verify(arguments: Sequence[str]) -> None:
    """Compare a folder or a server with the reference, and print what is found; VerificationError for another model."""
    options = make_verify_parser().parse_args(arguments)
    silence_libraries(load=True)
    from replaceme.export.comparison import compare_readings
    from replaceme.export.endpoint import read_endpoint
    from replaceme.export.reference import load_reference, read_model
    from replaceme.export.runtimes import is_converted, read_converted
    from replaceme.models.memory import load_within_budget
    from replaceme.models.model import Model

    reference = load_reference(options.reference or options.folder)
    if options.endpoint:
        served = read_endpoint(options.endpoint, reference, options.name)
    elif is_converted(options.folder):
        served = read_converted(options.folder, reference)
    else:
        source = Model(options.folder, options.folder.name)
        model = load_within_budget(source, read_params(None, {"device": "cpu"}), "float32")
        served = read_model(model, source.tokenizer(), reference)
    is_same, lines = compare_readings(reference, served)
    print("\n".join(lines))
    if not is_same:
        raise VerificationError(f"{options.endpoint or options.folder} is not the model that was proved.")


def make_convert_parser() -> Parser:
    """Return the parser of ``replaceme convert``."""
    description = "Convert a model to the format of llama.cpp or OpenVINO, by their own converters, and verify what is written."
    parser = plain_parser("replaceme convert", description, "replaceme convert smaller --to gguf --quantize q8_0")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the model's folder")
    parser.add_argument("--to", required=True, choices=("gguf", "openvino"), help="the format")
    parser.add_argument("--quantize", metavar="BITS", help="q8_0 or q4_k_m; for OpenVINO int8 or int4 [as the weights are]")
    parser.add_argument("--output", metavar="PATH", type=Path, help="the new file or folder [FOLDER.gguf, FOLDER-openvino]")
    return parser


def convert(arguments: Sequence[str]) -> None:
    """Convert a model, and print how far what is written is the same; VerificationError for another model."""
    options = make_convert_parser().parse_args(arguments)
    silence_libraries(load=True)
    from replaceme.export import convert as converter
    from replaceme.export.comparison import compare_readings
    from replaceme.export.reference import load_reference
    from replaceme.export.runtimes import read_converted

    def check(path: Path, is_coarse: bool) -> None:
        try:
            reference = load_reference(options.folder)
            is_same, lines = compare_readings(reference, read_converted(path, reference))
        except (ModelError, ResourceError) as missing:
            return print(f"not verified: {missing}")
        serious = [line for line in lines if line.startswith(("wrong: vocabulary", "wrong: tokenizer", "wrong: template"))]
        if is_coarse and not serious:
            lines = [f"{options.quantize}: {line}" for line in lines if line.startswith(("log-prob", "greedy"))]
        print("\n".join(lines))
        if serious or not (is_same or is_coarse):
            raise VerificationError(f"{options.folder}: what was converted is another model, and was not kept.")

    suffix = converter.FORMATS[options.to].suffix
    folder = options.folder.resolve()
    words = (folder.name, None if suffix else options.to, options.quantize)
    result = options.output or folder.with_name("-".join(word for word in words if word) + suffix)
    converter.convert(options.folder, options.to, options.quantize, result, check)
    print(f"converted: {result}")


def make_chat_parser() -> Parser:
    """Return the parser of ``replaceme chat``."""
    description = "Chat with a pruned model, beside the dense one: one answers after the other. An empty line ends the chat."
    parser = plain_parser("replaceme chat", description, "replaceme chat smaller --dense smollm2-135m-instruct")
    parser.add_argument("folder", metavar="FOLDER", help="the pruned model")
    parser.add_argument("--dense", metavar="MODEL", help="the model that it was made from: a folder, hub id or embedded name")
    parser.add_argument("--tokens", metavar="N", type=int, default=256, help="the most tokens of an answer [256]")
    return parser


def chat(arguments: Sequence[str]) -> None:
    """Answer what is typed by both models, each with its own conversation."""
    options = make_chat_parser().parse_args(arguments)
    silence_libraries(load=True)
    from replaceme.models.find import find_model
    from replaceme.models.formats import resolve_formats
    from replaceme.models.memory import load_within_budget

    speakers: list[tuple[str, Any, Any, Chat]] = []
    for title, name in (("pruned", options.folder), ("dense", options.dense)):
        if name is not None:
            params = read_params(None, {"model_path": name, "eval_dtype": "auto"})
            with renaming({"model_path": "FOLDER" if title == "pruned" else "--dense"}):
                source = find_model(params)
                params = resolve_formats(params, source)
                model = load_within_budget(source, params, params.eval_dtype)
            speakers.append((title, model, source.tokenizer(), []))
    with suppress(EOFError):
        while text := input("> ").strip():
            for title, model, tokenizer, turns in speakers:
                print(f"\n{title}: ", end="", flush=True)
                turns.append({"role": "user", "content": text})
                reply, speed = _answer(model, tokenizer, turns, options.tokens)
                turns.append({"role": "assistant", "content": reply})
                print(f"({speed:.1f} tokens a second)")


def _answer(model: Any, tokenizer: Any, turns: Chat, tokens: int) -> tuple[str, float]:
    """Print the answer as it is generated, and return it, and how many tokens a second were; without a template, continue."""
    from transformers import TextStreamer

    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        prompt = tokenizer(turns[-1]["content"], return_tensors="pt")
    streamer, began = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), time.monotonic()
    output = model.generate(**prompt.to(model.device), max_new_tokens=tokens, streamer=streamer)[0, prompt.input_ids.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True), len(output) / (time.monotonic() - began)
