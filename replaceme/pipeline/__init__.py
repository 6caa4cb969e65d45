"""The stages, one file each: a stage reads artifacts, computes with the other rooms, and writes artifacts.

It may import every other room.
"""
