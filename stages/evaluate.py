"""Score the pruned model and compare it with the dense one."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.evaluate import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
