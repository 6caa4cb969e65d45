"""Write calibration text with the dense model, where the dataset names self."""

from replaceme.pipeline.generate import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
