"""What every room stands on: parameters, places, errors, messages, files, and the forms that stages hand on.

It may import no other room.
"""
