"""The choice of the layers to remove. A criterion is one entry in ``criteria.py``.

It may import base to training.
"""
