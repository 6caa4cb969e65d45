"""One file a stage: it reads artifacts, calls the rooms, and writes artifacts.

It may import every other room.
"""
