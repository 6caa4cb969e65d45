"""Save the pruned model and prove that it computes what was solved for."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.export import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
