"""Muon: momentum, orthogonalized for each matrix (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

A step changes rare directions of a matrix as much as common ones. If no singular value of its momentum is tiny, an update has
the size of AdamW's (Liu et al., arXiv 2502.16982), for the same learning rate. torch's own ``Muon`` always multiplies in
bfloat16, which takes forty times as long on a processor without instructions for it, and doesn't divide this among processes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from replaceme.base.group import all_reduce_sum, shard

# Of the Newton-Schulz iteration: of a matrix of norm 1, it brings singular values of 0.003 or more to between 0.68 and 1.2, and
# makes smaller ones 480 times as large (Jordan et al.).
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
# The momentum; and the root mean square of an update's entries over the learning rate, as AdamW's is (Liu et al., section 2.2).
MOMENTUM, UPDATE_SIZE = 0.95, 0.2


class Muon(torch.optim.Optimizer):
    """Optimizer of matrices. Processes that share a training divide the matrices, and take the same step.

    Args:
        parameters: (rows, columns) with their names, float32, the same in all processes.
        products: the format of the products that orthogonalize.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], products: torch.dtype, weight_decay: float):
        super().__init__(parameters, {"lr": 0.0})
        self.products, self.weight_decay = products, weight_decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients, which become the updates."""
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                state, update = self.state[parameter], parameter.grad
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(update)
                update.lerp_(state["momentum_buffer"].lerp_(update, 1 - MOMENTUM), MOMENTUM)
                if shard().owns(number):
                    update.copy_(orthogonalize(update, self.products))
                else:
                    update.zero_()
            all_reduce_sum(
                {name: parameter.grad for name, parameter in zip(group["param_names"], group["params"], strict=True)}
            )
            rate = group["lr"]
            for parameter in group["params"]:
                size = UPDATE_SIZE * max(parameter.shape) ** 0.5
                parameter.mul_(1 - rate * self.weight_decay).sub_(parameter.grad, alpha=rate * size)


def orthogonalize(matrix: Tensor, products: torch.dtype) -> Tensor:
    """Return a matrix (rows, columns) with the same singular vectors and with singular values near 1, in the products' format.

    Args:
        matrix: the matrix; one of zeros stays zero.
        products: the format of the products.
    """
    rows, columns = matrix.shape
    x = matrix.div(torch.linalg.matrix_norm(matrix).clamp_min(1e-7)).to(products)
    x = x.T if rows > columns else x
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if rows > columns else x
