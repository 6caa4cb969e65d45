"""Choose the block of layers to remove."""

from replaceme.entry import stage
from replaceme.methods import METHODS
from replaceme.selection import select

if __name__ == "__main__":
    stage(select, METHODS)
