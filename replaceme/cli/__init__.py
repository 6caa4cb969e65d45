"""The command ``replaceme``, the scripts with the published names, and what they need of DVC and the hub.

It may import every other room.
"""
