"""Forward passes with observers: the profile of all layers, the statistics at a cut, sums over tokens.

It may import base, running and models.
"""
