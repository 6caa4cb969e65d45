"""Solvers: transforms and weights from sums and tokens.

It may import base, running, models, edits and statistics.
"""
