"""What pruning costs: profile + activations + solve, against one bare forward pass over the same tokens.

``python -m benchmarks.cost [documents]`` takes the model, text, dtype, batch size and threads of params.yaml. The bare
pass runs the decoder with the same batches and computes no logits. Passes alternate, and the medians are compared.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from replaceme.calibration import draw_documents
from replaceme.compute import resolve_device, use_threads
from replaceme.corpora import find_dataset
from replaceme.families import decoder_of
from replaceme.methods import METHODS
from replaceme.models import find_model
from replaceme.params import read_params
from replaceme.profile import profile_model
from replaceme.progress import silence_libraries
from replaceme.selection import allowed_starts, smallest
from replaceme.statistics import take_statistics

ROUNDS = 3
LIMIT = 2.2


def main(size: int) -> None:
    """Measure and print."""
    silence_libraries()
    params = read_params(Path("params.yaml"))
    use_threads(params.threads)
    source = find_model(params)
    model, family = source.load(params.dtype, resolve_device(params.device)), source.family()
    documents, _ = draw_documents(
        find_dataset(params).open(), source.tokenizer(), size, params.max_length, pack=params.pack, seed=params.seed
    )

    def bare() -> None:
        base = decoder_of(model)
        with torch.inference_mode():
            for batch in documents.batches(params.batch_size, str(model.device)):
                base(input_ids=batch.input_ids, use_cache=False)

    profiled = profile_model(model, family, documents, params.batch_size)
    starts = allowed_starts(params, len(family.decoder_layers(model)))
    (block,) = smallest(profiled["residual"], starts, params.layers_to_skip)
    method = METHODS[params.method]
    names = method.statistics(params)
    taken = take_statistics(model, family, documents, block, names, params.batch_size)
    steps: dict[str, Callable[[], object]] = {
        "bare forward pass": bare,
        "profile": lambda: profile_model(model, family, documents, params.batch_size),
        "activations": lambda: take_statistics(model, family, documents, block, names, params.batch_size),
        "solve": lambda: method.solve(params, block, taken.__getitem__),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = medians["bare forward pass"]
    setting = f"{params.dtype}, batch {params.batch_size}, {params.threads} threads"
    print(f"{documents.token_count} tokens, {setting}, median of {ROUNDS}")
    for name, median in medians.items():
        print(f"{name:<20} {median:8.2f} s  {median / reference:6.3f} x  {documents.token_count / median:8.0f} tokens/s")
    total = sum(median for name, median in medians.items() if name != "bare forward pass")
    print(f"{'all three':<20} {total:8.2f} s  {total / reference:6.3f} x  (limit {LIMIT})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
