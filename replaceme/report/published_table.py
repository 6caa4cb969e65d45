"""The published results shown for comparison: Llama-2-7B with a quarter of its layers removed (ReplaceMe, arXiv 2505.02819).

They are for another model, other tasks and other text. They show how much each kind of method lost there, not what this run
should reach.
"""

from typing import NamedTuple

SOURCE = "https://arxiv.org/abs/2505.02819"
LABEL = "published for Llama-2-7B (another model, other tasks and text): not comparable with the tables above in absolute terms"


class Published(NamedTuple):
    """A row: accuracies as fractions, and the average as a percentage of the dense model's."""

    method: str
    boolq: float
    hellaswag: float
    piqa: float
    mmlu: float
    average: float
    percent_of_dense: float


ROWS = (
    Published("dense", 0.708, 0.713, 0.781, 0.492, 0.674, 100.0),
    Published("LLM-Streamline (layer MSE; trained)", 0.675, 0.611, 0.715, 0.455, 0.614, 91.2),
    Published("LLM-Pruner (not trained; gradients)", 0.587, 0.546, 0.720, 0.253, 0.527, 78.2),
    Published("SliceGPT", 0.599, 0.475, 0.683, 0.288, 0.511, 75.9),
    Published("LaCo", 0.641, 0.557, 0.698, 0.265, 0.540, 80.2),
    Published("UIDL", 0.673, 0.597, 0.690, 0.446, 0.602, 89.3),
    Published("ReplaceMe, least squares", 0.715, 0.613, 0.698, 0.451, 0.619, 91.9),
    Published("ReplaceMe, cosine", 0.728, 0.622, 0.705, 0.453, 0.627, 93.1),
)
