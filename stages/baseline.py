"""Score the dense model."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.baseline import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
