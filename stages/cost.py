"""Write what the compression cost."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.cost import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
