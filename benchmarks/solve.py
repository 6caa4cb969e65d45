"""Time and memory of the solves at a large model's widths, on random statistics.

``python -m benchmarks.solve [d f]`` (default Llama-3-8B: 4096, 14336) times ReplaceMe's map (d × d) and the new weights of the
MLP's last linear (f × d). A refit solves for these once, a repair once for each kept layer after the cut.
"""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from replaceme.base.parameters import read_params
from replaceme.models.devices import use_processor
from replaceme.solvers.ridge import solve_correction, solve_ridge


def make_gram(width: int) -> Tensor:
    """Return a well-conditioned Gram matrix (width, width) float64; its diagonal is as uneven as that of real features."""
    scale = torch.logspace(-2, 2, width, dtype=torch.float64)
    rows = torch.randn(256, width, dtype=torch.float32)
    gram = (rows.T @ rows).double()
    gram.diagonal().add_(64.0)
    gram *= scale
    gram *= scale[:, None]
    return gram


def print_time(name: str, solve: Callable[[], object]) -> None:
    """Run ``solve``, and print its seconds and the peak resident set size so far."""
    began = time.perf_counter()
    solve()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:<44} {time.perf_counter() - began:7.1f} s   peak {peak:5.1f} GiB", flush=True)


def main(width: int, inputs: int) -> None:
    """Measure and print."""
    threads = read_params(Path("params.yaml")).threads
    use_processor(threads)
    torch.manual_seed(0)
    print(f"d {width}, f {inputs}, float64, {threads} threads")
    gram = make_gram(width)
    print_time("map (Cholesky, and eigenvalues for α)", lambda: solve_ridge(gram, gram, 1.0))
    del gram
    gram, cross = make_gram(inputs), torch.randn(inputs, width, dtype=torch.float64)
    ridge = torch.full((inputs,), 0.3, dtype=torch.float64)
    print_time("new weights of the MLP's last linear", lambda: solve_correction(gram, cross, ridge, overwrite=True))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3])) if len(sys.argv) > 2 else main(4096, 14336)
