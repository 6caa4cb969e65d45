"""Turn statistics into edits."""

from replaceme.entry import stage
from replaceme.methods import METHODS
from replaceme.solution import solve

if __name__ == "__main__":
    stage(solve, METHODS)
