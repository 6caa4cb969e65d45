"""Take the planned statistics."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.activations import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
