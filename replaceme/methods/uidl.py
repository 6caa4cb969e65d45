"""UIDL (arXiv 2403.17887): drop the block and put nothing in its place."""

from replaceme.methods.method import Method, leave_empty

METHOD = Method(solve=leave_empty("UIDL"))
