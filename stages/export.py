"""Save the pruned model and verify that it computes the solution."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.export import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
