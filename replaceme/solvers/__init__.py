"""From sums to maps and weights.

It may import base, models, edits and observers.
"""
