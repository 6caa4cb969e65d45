"""Score the pruned model and compare it with the dense one."""

from replaceme.pipeline.evaluate import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
