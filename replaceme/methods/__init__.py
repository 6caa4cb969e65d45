"""The pruning methods, one file each, listed in ``registry.py``; and the repair of kept layers.

It may import base to selection.
"""
