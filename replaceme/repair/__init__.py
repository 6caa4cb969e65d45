"""The kept layers, solved for again on what the shortened model computes: repair, later blocks, the choice of channels.

It may import base to methods.
"""
