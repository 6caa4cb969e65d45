"""The stages, one file each, and their run without DVC (``runner``, ``results``).

A stage reads artifacts, computes with the other rooms, and writes artifacts. It may import every other room.
"""
