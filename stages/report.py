"""Write the page of scores, figures and settings."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.report import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
