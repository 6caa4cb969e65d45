"""Make the edits that depend on an earlier solution."""

from replaceme.entry import stage
from replaceme.methods import METHODS
from replaceme.repair import repair

if __name__ == "__main__":
    stage(repair, METHODS)
