"""The dense model: found, checked, loaded and described. A model family is one description in ``families.py``.

It may import base.
"""
