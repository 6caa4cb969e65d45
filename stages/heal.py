"""Train the shortened model toward the dense one's predictions, if heal_tokens is above 0."""

from replaceme.pipeline.heal import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
