"""What runs a stage: by DVC or alone, in one process or several; its paths, its cost, and its errors as one sentence.

It may import base alone.
"""
