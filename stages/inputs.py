"""Check model, text and tasks, and write their fingerprints."""

from replaceme.pipeline.inputs import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
