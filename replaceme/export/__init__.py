"""Export: the pruned model as a folder, verified, with its model card.

It may import base to edits, and methods.
"""
