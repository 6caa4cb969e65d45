"""Write calibration text with the dense model, where the dataset names self."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.generate import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
