"""What was decided, as data; computed unfused; folded into weights.

It may import base and models.
"""
