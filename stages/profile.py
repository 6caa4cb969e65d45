"""Measure the distances between all pairs of layers, and what each layer does."""

from replaceme.entry import stage
from replaceme.profile import profile

if __name__ == "__main__":
    stage(profile)
