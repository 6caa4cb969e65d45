"""Take the statistics that the plan wants."""

from replaceme.entry import stage
from replaceme.statistics import observe_activations

if __name__ == "__main__":
    stage(observe_activations)
