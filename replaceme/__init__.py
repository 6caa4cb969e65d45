"""Depth pruning of language models: a block of decoder layers becomes one linear map, folded into kept weights."""

__version__ = "0.1.0"
