"""Score the pruned model beside the dense one."""

from replaceme.entry import stage
from replaceme.evaluation.scores import evaluate

if __name__ == "__main__":
    stage(evaluate)
