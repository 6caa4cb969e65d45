"""The pruning methods, one file each, listed in ``registry.py``.

It may import base to selection.
"""
