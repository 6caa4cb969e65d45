"""Scores of a model.

It may import base, models and corpora.
"""
