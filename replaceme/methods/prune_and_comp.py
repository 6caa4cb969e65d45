"""Prune&Comp (arXiv 2507.18212): drop layers one by one, and scale the state where each was (``replaceme.compensation``)."""

from replaceme.methods.method import Method, drop

METHOD = Method(
    stand_in=lambda params: "scalar",
    solve=drop("Prune&Comp"),
    criterion="compensated",
    words="puts one number there",
)
