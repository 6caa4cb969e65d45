"""Train what was solved for a while, where the settings ask for it."""

from replaceme.base.stage import run_stage
from replaceme.pipeline.heal import STAGE

if __name__ == "__main__":
    run_stage(STAGE)
