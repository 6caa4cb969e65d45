"""Save the pruned model and verify that it computes the solution."""

from replaceme.pipeline.export import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
