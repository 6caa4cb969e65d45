"""Evaluation: the scores of a model, and their comparison with another's.

It may import base, running, models and calibration.
"""
