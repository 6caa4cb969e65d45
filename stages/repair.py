"""Solve for the edits that depend on the first block's solution."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.repair import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
