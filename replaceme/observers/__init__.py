"""One pass over the documents, many observers: the profile of all layers, the statistics at a cut, sums.

It may import base and models.
"""
