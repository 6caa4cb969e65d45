"""Depth pruning of language models: replace a block of decoder layers by one linear map, folded into kept weights."""

__version__ = "0.1.0"
