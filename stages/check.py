"""Compare the result with plain removal, and keep the better one, if keep_if_better is set."""

from replaceme.pipeline.check import STAGE
from replaceme.running.stage import run_stage

if __name__ == "__main__":
    run_stage(STAGE)
