"""Peak memory of profile, activations and repair at 16k and 128k calibration tokens: it must not grow with the tokens.

``python -m benchmarks.memory`` measures each size in a process of its own, with params.yaml's model and random token ids, and
prints the peak resident set sizes and their ratio.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from replaceme.base.documents import Documents
from replaceme.base.parameters import read_params
from replaceme.base.plan import Block, Plan
from replaceme.base.progress import silence_libraries
from replaceme.methods.registry import METHODS
from replaceme.models.context import ModelContext
from replaceme.models.devices import use_processor
from replaceme.models.find import find_model
from replaceme.repair.repair import repair_layers
from replaceme.repair.resume import Checkpoints
from replaceme.statistics.cut_statistics import take_statistics
from replaceme.statistics.profile import profile_model

SIZES = (16_384, 131_072)
LENGTH = 1024


def measure(tokens: int) -> None:
    """Run profile, activations and repair on ``tokens`` tokens and print the peak resident set size in MiB."""
    silence_libraries()
    params = read_params(Path("params.yaml"))
    use_processor(params.threads)
    source = find_model(params)
    model, family = source.load(params.dtype), source.family()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, int(source.config().vocab_size), (tokens // LENGTH, LENGTH), generator=generator)
    documents = Documents(list(rows))
    context = ModelContext(model, family, documents, params.batch_size)
    profile_model(context)
    layers = len(context.layers)
    middle = layers // 2
    block, method = Block(middle, min(middle + 8, layers)), METHODS[params.method]
    names = method.statistics(params)
    taken = take_statistics(context, block, names)
    edits = method.solve(params, block, taken.__getitem__).edits
    edits.removed_layers = [*block.layers]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), "")
        repair_layers(params, context, edits, Plan((block,), names), checkpoints)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure every size in its own process and print the ratio."""
    peaks = []
    for tokens in SIZES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", str(tokens)], stdout=subprocess.PIPE, text=True, check=True
        )
        peaks.append(float(done.stdout.split()[-1]))
        print(f"{tokens:>8} tokens: peak {peaks[-1]:.0f} MiB", flush=True)
    print(f"ratio {peaks[1] / peaks[0]:.3f} (limit 1.05)")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        main()
