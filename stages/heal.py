"""Train the last linears of the layers from the cut on, if heal_epochs is above 0."""

from replaceme.pipeline.heal import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
