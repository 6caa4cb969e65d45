"""Healing as a fraction of the machine's rate of products, and its memory beside the formula of docs/scale.md.

``python -m benchmarks.healing [which …]`` trains params.yaml's model without the ``layers_to_skip`` layers in its middle, a few
steps on its text, for each ``heal_weights`` (all, after_cut, outputs and lora unless named), in a process of its own. For each
token, a weight of the dense model takes 2 operations, one of the shortened model 4 (output, and gradient of the input) and one
that is trained 2 more; the head counts, the embedding doesn't. The rate is that of products of a batch's states with the first
linear of an MLP, in the same format, measured between the steps.
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from replaceme.base.accelerators import peak_bytes, synchronize
from replaceme.base.parameters import read_params
from replaceme.base.progress import silence_libraries
from replaceme.calibration.draw import draw_documents
from replaceme.calibration.find import find_datasets
from replaceme.edits.edits import Edits
from replaceme.models.context import ModelContext
from replaceme.models.devices import resolve_device, use_processor
from replaceme.models.find import find_model
from replaceme.training.distillation import LogitDistillation
from replaceme.training.training import StepPlan, make_optimizers

STEPS, WHICH = 3, ("all", "after_cut", "outputs", "lora")


def measure(which: str) -> None:
    """Train a few steps and print a row."""
    silence_libraries()
    params = read_params(Path("params.yaml"))
    use_processor(params.threads)
    source = find_model(params)
    model, family = source.load(params.dtype, resolve_device(params.device)), source.family()
    size = max(params.heal_tokens_per_step // params.max_length, 2)
    corpora = [dataset.open(params.seed) for dataset in find_datasets(params) if dataset]
    documents, _ = draw_documents(corpora, source.tokenizer(), params.model_copy(update={"dataset_size": size}))
    context = ModelContext(model, family, documents, params.batch_size)
    before = peak_memory()
    layers = family.decoder_layers(model)
    start = (len(layers) - params.layers_to_skip) // 2
    edits = Edits("", [*range(start, start + params.layers_to_skip)])
    task = LogitDistillation(context, edits, start - 1, which, params.heal_rank)
    parameters = task.trainable_parameters()
    muon = None if which == "lora" else model.dtype
    optimizers = make_optimizers(parameters.values(), StepPlan([], [], [], "", muon=muon))
    times, rates = list[float](), list[float]()
    linears = [[part for part in layer.modules() if isinstance(part, torch.nn.Linear)] for layer in layers]
    widest = max(linears[0], key=lambda linear: linear.out_features)
    with task.training_context():
        for _ in range(STEPS + 1):
            began = now(model)
            task.loss(parameters, range(len(documents)))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            times.append(now(model) - began)
            rates.append(product_rate(model, widest, params.batch_size * params.max_length))
    head = model.get_output_embeddings().weight.numel()
    sizes = [sum(linear.weight.numel() for linear in layer) for layer in linears]
    run = sum(size for at, size in enumerate(sizes) if at >= task.skipped and at not in edits.removed_layers)
    trained = sum(value.numel() for value in parameters.values() if value.ndim > 1)
    operations = 2 * (sum(sizes) + head) + 4 * (run + head) + 2 * trained
    tokens, rate = documents.token_count / statistics.median(times[1:]), statistics.median(rates[1:])
    print(
        f"{which:<10}{trained / 1e6:8.1f} M{tokens:8.0f} tokens/s{operations * tokens / 1e9:8.0f} of {rate / 1e9:.0f} GFLOP/s, "
        f"{operations * tokens / rate:.2f}; memory {peak_memory() / 1e9:.2f} GB, of which {before / 1e9:.2f} before"
    )


def now(model: torch.nn.Module) -> float:
    """Return the time in seconds, after what the model's device was given."""
    synchronize(next(model.parameters()).device)
    return time.perf_counter()


def product_rate(model: torch.nn.Module, linear: torch.nn.Linear, tokens: int) -> float:
    """Return the operations per second of a linear's products with the states of so many tokens."""
    states = torch.randn(tokens, linear.in_features).to(linear.weight)
    times = []
    with torch.inference_mode():
        for _ in range(5):
            began = now(model)
            linear(states)
            times.append(now(model) - began)
    return 2 * tokens * linear.weight.numel() / min(times)


def peak_memory() -> float:
    """Return the peak of the memory in bytes: of the GPU, if there is one, else of the process."""
    return peak_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(chosen: list[str]) -> None:
    """Measure each choice in a process of its own."""
    for which in chosen:
        subprocess.run([sys.executable, "-m", "benchmarks.healing", "--one", which], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2])
    else:
        main(sys.argv[1:] or [*WHICH])
