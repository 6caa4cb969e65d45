"""Decide which statistics of the chosen blocks the method needs."""

from replaceme.pipeline.plan import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
