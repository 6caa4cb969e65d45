"""The report's page (tables, figures, sentences), and the comparison of experiments.

It may import base to methods, and evaluation.
"""
