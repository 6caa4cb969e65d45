"""The dense model: find, check, load and describe it. Each model family has one description in ``families.py``.

It may import base and running.
"""
