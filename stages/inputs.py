"""Look at model, text and tasks, and write their fingerprints."""

from replaceme.entry import stage
from replaceme.inputs import inspect_inputs
from replaceme.methods import METHODS

if __name__ == "__main__":
    stage(inspect_inputs, METHODS)
