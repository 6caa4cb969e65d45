"""The pruned model as a folder: saved, proved, with its card.

It may import base, models and edits.
"""
