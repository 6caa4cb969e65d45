"""Decide which statistics of the chosen blocks the method needs."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.plan import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
