"""Save the pruned model and prove that it computes what was solved for."""

from replaceme.entry import stage
from replaceme.export import export

if __name__ == "__main__":
    stage(export)
