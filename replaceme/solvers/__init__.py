"""Solvers: transforms and weights from sums and tokens.

It may import base, models, edits and observers.
"""
