"""The statistics that the method wants of the chosen blocks."""

from replaceme.entry import stage
from replaceme.methods import METHODS
from replaceme.planning import plan

if __name__ == "__main__":
    stage(plan, METHODS)
