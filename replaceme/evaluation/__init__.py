"""Scores of a model: perplexity on held-out text, and accuracy through lm-eval on tasks made from it."""
