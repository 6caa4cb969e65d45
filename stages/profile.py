"""Measure the distances between all pairs of layers, and the influence and norms of each layer."""

from replaceme.pipeline.profile import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
