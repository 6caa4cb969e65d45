"""LaCo (arXiv 2402.11187): merge layers into the one in front of them, chosen and merged at once (``replaceme.collapse``)."""

from replaceme.methods.method import Method, drop

METHOD = Method(
    solve=drop("LaCo"),
    criterion="collapse",
    words="merges layers by what they merge to",
    selections=(),
    several=False,
)
