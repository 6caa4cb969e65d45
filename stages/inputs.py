"""Check model, text and tasks, and write their fingerprints."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.inputs import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
