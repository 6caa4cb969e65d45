"""Compute the edits from the statistics."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.solve import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
