"""Weights trained on documents.

It may import base, models, edits and observers.
"""
