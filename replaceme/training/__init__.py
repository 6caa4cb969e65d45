"""Training of weights on documents.

It may import base, running, models, edits and statistics.
"""
