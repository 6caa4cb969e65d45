"""Score the dense model."""

from replaceme.entry import stage
from replaceme.evaluation.scores import score_baseline

if __name__ == "__main__":
    stage(score_baseline)
