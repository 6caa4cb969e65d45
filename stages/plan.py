"""The statistics that the method wants of the chosen blocks."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.plan import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
