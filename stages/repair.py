"""Solve for the edits that depend on the first block's solution."""

from replaceme.pipeline.repair import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
