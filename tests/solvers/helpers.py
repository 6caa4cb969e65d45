"""Made-up tokens and the sums over them, for tests that need no model."""

import torch
from torch import Tensor

from replaceme.statistics.shards import Tokens

WIDTH = 5

STRUCTURES = ["dense", "diagonal", "two_vectors", "triangular"]


class Held:
    """Shards in memory."""

    def __init__(self, M: Tensor, Z: Tensor | None, H: Tensor, rows: int = 17):
        self.parts = [
            (M[start : start + rows], None if Z is None else Z[start : start + rows], H[start : start + rows])
            for start in range(0, len(M), rows)
        ]
        self.counts = [len(part[0]) for part in self.parts]

    def read(self, shard: int) -> Tokens:
        return self.parts[shard]


def made_tokens(count: int = 50, width: int = WIDTH, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return M, Z and H (count, width) with something to be found: H = Z + M A and noise."""
    generator = torch.Generator().manual_seed(seed)
    M, Z, noise = (torch.randn(count, width, generator=generator, dtype=torch.float64) for _ in range(3))
    A = torch.eye(width, dtype=torch.float64) + 0.7 * torch.randn(width, width, generator=generator, dtype=torch.float64)
    return M, Z, Z + M @ A + 0.3 * noise


def made_sums(M: Tensor, Z: Tensor, H: Tensor) -> dict[str, Tensor]:
    """Return what the statistic ``gram`` holds of these tokens."""
    Y = H - Z
    return {
        "gram": M.T @ M, "cross": M.T @ Y, "target_squares": Y.square().sum(), "output_squares": H.square().sum(),
        "gap_squares": (Y - M).square().sum(), "tokens": torch.tensor(float(len(M)), dtype=torch.float64),
    }  # fmt: skip


def made_x(structure: str) -> Tensor:
    size = {"dense": WIDTH**2, "diagonal": WIDTH, "two_vectors": 2 * WIDTH, "triangular": WIDTH * (WIDTH + 1) // 2}[structure]
    return torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def made(tokens: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    Y = M @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return M, Y + torch.randn(tokens, width, generator=generator, dtype=torch.float64)
