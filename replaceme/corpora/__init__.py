"""Text: found, tokenized, drawn as calibration documents.

It may import base and models.
"""
