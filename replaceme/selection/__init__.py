"""Which layers go. A criterion is one entry in ``criteria.py``.

It may import base to training.
"""
