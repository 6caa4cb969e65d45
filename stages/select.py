"""Choose the layers to remove."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.select import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
