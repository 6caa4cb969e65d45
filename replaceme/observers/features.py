"""A layer's linears as one least squares: the inputs of those that are solved for, side by side, are its features.

With row vectors, what a layer adds to the residual stream is ``A W_oᵀ + G W_dᵀ`` (and biases), where ``A`` enters the linear
that ends the attention and ``G`` the one that ends the MLP. A change of both weights is one linear map of ``[A | G | 1]``; the
column of ones is there where a linear has a bias. Where the family multiplies what is added by ρ, so are the features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replaceme.models.families import Family, Linear, inputs_of
from replaceme.observers.walk import Signal

LINEARS: tuple[Linear, ...] = ("attention_output", "mlp_output")
SIGNAL: Mapping[Linear, Signal] = {"attention_output": "attention_features", "mlp_output": "mlp_features"}


@dataclass(frozen=True)
class Features:
    """Which columns belong to which linear.

    Attributes:
        widths: number of inputs of each linear, in the order of the columns.
        biased: the linear whose bias the last column, of ones, stands for; None where there is no such column.
        multiplier: ρ.
    """

    widths: Mapping[Linear, int]
    biased: Linear | None
    multiplier: float = 1.0

    @classmethod
    def of(cls, layer: nn.Module, family: Family, linears: Sequence[Linear]) -> "Features":
        """Return the features of some linears of a layer."""
        modules = {linear: family.linear_of(layer, linear) for linear in LINEARS if linear in linears}
        # Two biases add to the same states: one of them is enough.
        biased = [linear for linear, module in modules.items() if getattr(module, "bias", None) is not None]
        widths = {linear: inputs_of(module) for linear, module in modules.items()}
        return cls(widths, biased[-1] if biased else None, family.multiplier)

    @classmethod
    def from_tensor(cls, layout: Tensor) -> "Features":
        """Read what ``as_tensor`` wrote."""
        *widths, biased = layout.tolist()
        return cls(
            {linear: width for linear, width in zip(LINEARS, widths, strict=True) if width},
            LINEARS[biased] if biased >= 0 else None,
        )

    def as_tensor(self) -> Tensor:
        """Return the layout as 3 int64: the two widths (0: not there), and which linear has the bias (−1: none)."""
        biased = LINEARS.index(self.biased) if self.biased else -1
        return torch.tensor([*(self.widths.get(linear, 0) for linear in LINEARS), biased])

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The signals that hold the inputs."""
        return tuple(SIGNAL[linear] for linear in self.widths)

    @property
    def constant(self) -> bool:
        """Whether the last column is one of ones."""
        return self.biased is not None

    def __len__(self) -> int:
        return sum(self.widths.values()) + self.constant

    def columns(self, *inputs: Tensor) -> Tensor:
        """Return new (tokens, columns) float32 of each linear's inputs (tokens, width)."""
        ones = [inputs[0].new_ones(len(inputs[0]), 1)] if self.constant else []
        columns = torch.cat([*inputs, *ones], dim=1).float()
        return columns if self.multiplier == 1 else columns.mul_(self.multiplier)

    def per_column(self, values: Mapping[Linear, float]) -> Tensor:
        """Return each linear's value for each of its columns, (columns,) float64."""
        widths = torch.tensor([*self.widths.values()])
        columns = torch.tensor([values[linear] for linear in self.widths], dtype=torch.float64).repeat_interleave(widths)
        return torch.cat([columns, columns.new_zeros(int(self.constant))])

    def only(self, linear: Linear) -> tuple["Features", slice]:
        """Return the features of the last linear alone, and where its columns are; a bias stays with it."""
        assert linear == list(self.widths)[-1]
        alone = Features({linear: self.widths[linear]}, self.biased if self.biased == linear else None)
        start = sum(self.widths.values()) - self.widths[linear]
        return alone, slice(start, start + len(alone))

    def parts(self, change: Tensor) -> Iterator[tuple[Linear, Tensor, Tensor | None]]:
        """Yield each linear with its part of a change (columns, d): of its weight (d, inputs), and of its bias (d,)."""
        for linear, rows in zip(self.widths, change.split([*self.widths.values(), int(self.constant)]), strict=False):
            yield linear, rows.T, change[-1] if self.biased == linear else None
