"""New weights for the kept layers, fitted to the states of the shortened model: repair, later blocks, the choice of channels.

It may import base to methods.
"""
