"""Choose the layers to remove."""

from replaceme.pipeline.select import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
