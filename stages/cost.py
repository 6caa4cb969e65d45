"""Write what the compression cost."""

from replaceme.pipeline.cost import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
