"""The pipeline at a large model's shapes, streamed: time, processor time, peak memory, GPU's too, and bytes read, by stage.

``python -m benchmarks.scale FOLDER [SHAPES [MEMORY [DEVICE]]]`` makes a Llama of random bfloat16 weights in FOLDER, layer by
layer, unless it is there already, and runs every stage up to the verified export in a process of its own: a quarter of the
layers less by ``selection: residual``, ``transform: refit`` and ``repair``, on 16 documents of 256 tokens. SHAPES is
llama-3.1-8b (16 GB), llama-3.1-8b-short (8 of its 32 layers, 5.6 GB: streamed, the memory is the same), llama-3.1-70b (141 GB)
or tiny; MEMORY is the parameter ``memory``, DEVICE is ``device`` (cpu). Random weights say nothing about quality.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.sandbox import ENVIRONMENT, copy_code, make_inputs, set_params

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size
SHAPES = {
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-8b-short": (4096, 14336, 8, 32, 8, 128256),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256),
    "tiny": (32, 48, 8, 4, 2, 400),
}
STAGES = ["inputs", "generate", "calibrate", "profile", "select", "plan", "activations", "solve", "repair", "heal", "export"]
SETTINGS = {
    "dataset_size": "16", "max_length": "256", "selection": "residual", "transform": "refit", "repair": "true",
    "alpha": "0.001", "tasks": "[]",
}  # fmt: skip


def make_model(folder: Path, shapes: str) -> None:
    """Write a Llama of random weights: a safetensors file for each layer, and one for what is outside of them."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from replaceme.base.files import write_json

    hidden, inner, layers, heads, groups, vocabulary = SHAPES[shapes]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        found = re.match(r"model\.layers\.(\d+)\.", name)
        parts.setdefault(f"layer-{found[1]}" if found else "outside", {})[name] = parameter.shape
    places: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate(parts.values(), start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        values = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, hidden**-0.5, generator=generator)
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in names.items()
        }
        save_file(values, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    size = sum(shape.numel() for names in parts.values() for shape in names.values()) * 2
    config.save_pretrained(folder)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})


def prepare(folder: Path, shapes: str) -> None:
    """Make the model with a small tokenizer, and a text, unless they are there."""
    ready = folder / "ready"
    if ready.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    make_inputs(folder, 0)
    for weights in (folder / "model").glob("*.safetensors"):
        weights.unlink()
    make_model(folder / "model", shapes)
    ready.touch()


def run_stage(stage: str, folder: Path, log: Path) -> tuple[float, float, float, float, float]:
    """Run a stage; return seconds, those of all processors together, the peak of its own memory in GB, the same with pages of
    mapped files (which the system takes back when it needs them), and GB read from the disk, not from the page cache.
    """
    began, own = time.perf_counter(), 0.0
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", f"stages.{stage}"], cwd=folder, stdout=file, stderr=file,
            env={**os.environ, **{key: value for key, value in ENVIRONMENT.items() if "THREADS" not in key}},
        )  # fmt: skip
        # Linux keeps no peak of this one: what is there for less than this pause can be missed.
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if found := re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")):
                own = max(own, int(found[1]) * 1024 / 1e9)
            time.sleep(0.02)
        _, status, usage = ended
    if code := os.waitstatus_to_exitcode(status):
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        sys.exit(f"stage {stage} ended with {code}; its log is {log}, which ends:\n{end}")
    seconds, busy = time.perf_counter() - began, usage.ru_utime + usage.ru_stime
    return seconds, busy, own, usage.ru_maxrss * 1024 / 1e9, usage.ru_inblock * 512 / 1e9


def gpu_peak(stage: str, folder: Path) -> float:
    """Return the peak of a stage's memory on GPUs, in GB, as the stage kept it; 0 if it used none."""
    from replaceme.methods.registry import METHODS
    from replaceme.running.cost import kept_cost
    from replaceme.running.stage import COMPRESSION, pipeline_params

    with contextlib.chdir(folder):
        cost = kept_cost(stage, pipeline_params(METHODS)) if stage in COMPRESSION else None
    return float((cost or {}).get("peak_cuda_bytes", 0)) / 1e9


def main(folder: Path, shapes: str = "llama-3.1-8b", memory: str = "3GB", device: str = "cpu") -> None:
    """Make the model, run the stages, and print a row for each."""
    # In a process of its own: the peak of a process begins with that of the one that started it.
    subprocess.run([sys.executable, "-m", "benchmarks.scale", "--prepare", str(folder), shapes], check=True)
    inputs = folder.resolve() / shapes
    work, log = inputs / "run", inputs / "log.txt"
    shutil.rmtree(work, ignore_errors=True)
    log.unlink(missing_ok=True)
    copy_code(work)
    (work / "metrics").mkdir()
    layers = SHAPES[shapes][2]
    # Some kept layers have to come after the block, or there is nothing to repair.
    cut = {"layers_to_skip": str(layers // 4), "max_distance_layer": str(layers * 3 // 4)}
    given = {"model_path": str(inputs / "model"), "dataset": str(inputs / "text.txt"), "memory": memory, "device": device}
    set_params(work, SETTINGS | given | cut)
    weights = sum(path.stat().st_size for path in (inputs / "model").glob("*.safetensors")) / 1e9
    print(f"{shapes}: {weights:.1f} GB of weights, memory: {memory}; the log is {log}")
    memories = f"{'memory':>8} {'with files':>10} {'on GPU':>8}"
    print(f"{'stage':<12} {'seconds':>8} {'processor':>10} {memories} {'from disk':>10}  in weights' sizes")
    rows = []
    for stage in STAGES:
        *others, read = run_stage(stage, work, log)
        rows.append((*others, gpu_peak(stage, work) if device != "cpu" else 0.0, read))
        print_row(stage, rows[-1], weights)
    seconds, busy, own, peaks, gpu, disk = zip(*rows, strict=True)
    print_row("all", (sum(seconds), sum(busy), max(own), max(peaks), max(gpu), sum(disk)), weights)


def print_row(stage: str, row: Sequence[float], weights: float) -> None:
    """Print a row of the table."""
    seconds, busy, own, peak, gpu, disk = row
    amounts = f"{own:>5.2f} GB {peak:>7.2f} GB {gpu:>5.2f} GB {disk:>7.1f} GB"
    print(f"{stage:<12} {seconds:>8.0f} {busy:>8.0f} s {amounts}  {disk / weights:>5.2f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]) / sys.argv[3], sys.argv[3])
    elif 2 <= len(sys.argv) <= 5:
        main(Path(sys.argv[1]), *sys.argv[2:])
    else:
        sys.exit(f"usage: python -m benchmarks.scale FOLDER [{'|'.join(SHAPES)} [MEMORY [DEVICE]]]")
