"""Measure the distances between all pairs of layers, and the influence and norms of each layer."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.profile import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
