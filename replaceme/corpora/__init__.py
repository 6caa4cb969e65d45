"""Where calibration text comes from: an embedded sample, the user's file, or a hub dataset that is streamed.

A corpus yields rows, each a text or a chat, already in the seeded order; a running corpus (one long text, or a few)
yields texts that are to be cut into documents.
"""

from replaceme.corpora.corpus import Chat, Corpus, Row
from replaceme.corpora.find import DatasetSource, find_dataset

__all__ = ["Chat", "Corpus", "DatasetSource", "Row", "find_dataset"]
