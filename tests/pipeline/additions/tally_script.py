"""Count the planned blocks."""

from replaceme.pipeline.tally import STAGE

from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
