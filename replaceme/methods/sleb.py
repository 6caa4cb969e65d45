"""SLEB (arXiv 2402.09025): drop layers one by one, each time the one whose removal raises the loss least."""

from replaceme.methods.method import Method, leave_empty
from replaceme.selection.criteria import CRITERIA

METHOD = Method(solve=leave_empty("SLEB"), criterion=CRITERIA["greedy"])
