"""Write the page that says what the pruning cost."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.report import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
