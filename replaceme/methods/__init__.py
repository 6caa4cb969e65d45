"""What takes the place of the layers that go: one file a method, listed in ``registry.py``; repair among them.

It may import base to selection.
"""
