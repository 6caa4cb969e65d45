"""Muon: momentum, orthogonalized for each matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

All singular values of an update are near 1, so that a step changes rare directions as much as common ones. Updates have the
size of AdamW's (Liu et al., arXiv 2502.16982), for the same learning rate. torch's own ``Muon`` always multiplies in bfloat16,
which takes forty times as long on a processor without instructions for it; and it takes no stacks of matrices, as experts are.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

# Of the Newton-Schulz iteration, which brings singular values from 0 to 1 into 0.7 to 1.2 in these steps (Jordan et al.).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# The momentum; and the root mean square of an update's entries over the learning rate, as AdamW's is (Liu et al., section 2.2).
MOMENTUM, UPDATE_SIZE = 0.95, 0.2


class Muon(torch.optim.Optimizer):
    """Optimizer of matrices.

    Args:
        parameters: (…, rows, columns), float32.
        products: the format of the products that orthogonalize.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(self, parameters: Iterable[Tensor], products: torch.dtype, weight_decay: float):
        super().__init__(parameters, {"lr": 0.0})
        self.products, self.weight_decay = products, weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                momentum: Tensor = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonalize(parameter.grad.lerp(momentum, MOMENTUM), self.products)
                size = UPDATE_SIZE * max(parameter.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * self.weight_decay).sub_(update, alpha=group["lr"] * size)


def orthogonalize(matrix: Tensor, products: torch.dtype) -> Tensor:
    """Return a matrix (…, rows, columns) with the same singular vectors and all singular values near 1, in its dtype.

    Args:
        matrix: the matrix; one of zeros stays zero.
        products: the format of the products.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)).to(products)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)
