"""Take the planned statistics."""

from replaceme.pipeline.activations import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
