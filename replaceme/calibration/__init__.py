"""Text: find it, tokenize it, draw calibration documents.

It may import base, running and models.
"""
