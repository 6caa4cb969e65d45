"""Compute the edits from the statistics."""

from replaceme.pipeline.solve import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
