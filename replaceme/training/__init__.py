"""Training of weights on documents.

It may import base, models, edits and observers.
"""
