"""Draw calibration documents."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.calibrate import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
