"""Healing as a fraction of the machine's rate of products, and its memory.

``python -m benchmarks.healing [WEIGHTS OPTIMIZER]`` trains params.yaml's model without the ``layers_to_skip`` layers in its
middle, a few steps on its text: with these values of ``heal_weights`` and ``heal_optimizer``, or with each of several, in a
process of its own. For each token, a weight of the dense model's linears takes 2 operations, one of the shortened model 4
(output, and gradient of the input) and one that is trained 2 more; the head counts, embedding and attention don't. Muon adds
its own for each step. The rate is that of products of a batch's states with the widest linear of the first layer, in the same
format, measured between the steps.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from replaceme.base.accelerators import peak_bytes, synchronize
from replaceme.base.parameters import read_params
from replaceme.base.progress import silence_libraries
from replaceme.calibration.draw import draw_documents
from replaceme.calibration.find import find_datasets
from replaceme.edits.edits import Edits
from replaceme.models.context import ModelContext
from replaceme.models.devices import resolve_device, use_processor
from replaceme.models.families import is_conv1d, linears_within
from replaceme.models.find import find_model
from replaceme.running.cost import peak_memory
from replaceme.training.distillation import BETAS, CLIP, LogitDistillation
from replaceme.training.muon import ITERATIONS
from replaceme.training.training import StepPlan, TrainingRun

STEPS, CHOICES = 3, ("all adamw", "all muon", "after_cut adamw", "outputs adamw", "lora adamw")


def measure(which: str, optimizer_name: str) -> None:
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
    before = memory_peak()
    layers = family.decoder_layers(model)
    start = (len(layers) - params.layers_to_skip) // 2
    edits = Edits("", [*range(start, start + params.layers_to_skip)])
    task = LogitDistillation(context, edits, start - 1, which, params.heal_rank)
    parameters = task.trainable_parameters()
    muon = task.matrices if optimizer_name == "muon" else []
    count = STEPS + 1
    rates = [params.heal_learning_rate] * count
    steps = [range(len(documents))] * count
    plan = StepPlan(steps, rates, [], "heal_learning_rate", BETAS, CLIP, muon=muon, muon_products=model.dtype)
    linears: list[list[Any]] = [[*linears_within(layer).values()] for layer in layers]
    widest = max(linears[0], key=lambda linear: linear.weight.numel())
    times, product_rates = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder, task.training_context():
        training = TrainingRun(task, parameters, plan, Path(folder), "")
        for step in range(count):
            began = now(model)
            training.take_step(step)
            times.append(now(model) - began)
            product_rates.append(product_rate(model, widest, params.batch_size * params.max_length))
    head = model.get_output_embeddings().weight.numel()
    sizes = [sum(linear.weight.numel() for linear in layer) for layer in linears]
    run = sum(size for at, size in enumerate(sizes) if at >= task.skipped and at not in edits.removed_layers)
    trained = sum(value.numel() for value in parameters.values() if value.ndim > 1)
    # The factors of lora are multiplied with in both directions too.
    operations = 2 * (sum(sizes) + head) + 4 * (run + head) + (6 if which == "lora" else 2) * trained
    shapes = [sorted(parameters[name].shape) for name in muon]
    of_a_step = documents.token_count * operations + sum(ITERATIONS * (4 * m * m * n + 2 * m**3) for m, n in shapes)
    median, rate = statistics.median(times[1:]), statistics.median(product_rates[1:])
    print(
        f"{which:<10}{optimizer_name:<6}{trained / 1e6:8.1f} M{documents.token_count / median:8.0f} tokens/s"
        f"{of_a_step / median / 1e9:8.0f} of {rate / 1e9:.0f} GFLOP/s, {of_a_step / median / rate:.2f}; "
        f"memory {memory_peak() / 1e9:.2f} GB, of which {before / 1e9:.2f} before"
    )


def now(model: torch.nn.Module) -> float:
    """Return the time in seconds, after what the model's device was given."""
    synchronize(next(model.parameters()).device)
    return time.perf_counter()


def product_rate(model: torch.nn.Module, linear: Any, tokens: int) -> float:
    """Return the operations per second of a linear's products with the states of so many tokens."""
    rows, columns = linear.weight.shape
    states = torch.randn(tokens, rows if is_conv1d(linear) else columns).to(linear.weight)
    times = []
    with torch.inference_mode():
        for _ in range(5):
            began = now(model)
            linear(states)
            times.append(now(model) - began)
    return 2 * tokens * linear.weight.numel() / min(times)


def memory_peak() -> int:
    """Return the peak of the memory in bytes: of the GPUs, if there are any, else of the process."""
    return peak_bytes() or peak_memory()


def main(choices: Sequence[str]) -> None:
    """Measure each choice in a process of its own."""
    for choice in choices:
        subprocess.run([sys.executable, "-m", "benchmarks.healing", *choice.split()], check=True)


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main(CHOICES)
