"""Write the page of scores, figures and settings."""

from replaceme.pipeline.report import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
