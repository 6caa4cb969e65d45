"""Edits: a method's decisions as data, computed with hooks (unfused) or folded into the weights.

It may import base, running and models.
"""
