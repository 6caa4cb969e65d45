"""The base of all rooms: parameters, errors, log messages, files, and the data that stages pass on.

It may import no other room.
"""
