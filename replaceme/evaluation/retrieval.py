"""Embedded task: write the number that belongs to a name, out of several given before; scored by exact match.

    The code of the red box is 4817. The code of the green key is 2093.
    Question: What is the code of the red box?
    Answer: The code of the red box is

The text is made by seeded code, so its answers are known, and no model has read it. Copying out of the context goes through
several layers (induction; Olsson et al., arXiv 2209.11895), and the answer is written token by token: what multiple choice
forgives, this doesn't. A model that writes any of the codes scores ``mean(1 / pairs)``; one that ignores them scores 0.
"""

import random
from typing import Any

ITEMS, SEED = 160, 0
# Names with codes in an item, in turn: from what a small model can do to what a large one still finds hard.
PAIRS = (2, 4, 8, 16)
# Increase when an item changes.
VERSION = 1
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey", "pink", "orange", "purple", "silver")
THINGS = ("box", "door", "key", "book", "cup", "bag", "lamp", "chair", "coat", "hat", "car", "boat", "bell", "drum", "clock")


def retrieval_items() -> list[dict[str, Any]]:
    """Return ``ITEMS`` items ``{query, answer}``; deterministic."""
    chance = random.Random(SEED)
    return [_item(chance, PAIRS[number % len(PAIRS)]) for number in range(ITEMS)]


def _item(chance: random.Random, pairs: int) -> dict[str, Any]:
    names = chance.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], pairs)
    codes = chance.sample(range(1000, 10000), pairs)
    asked = chance.randrange(pairs)
    context = " ".join(f"The code of the {name} is {code}." for name, code in zip(names, codes, strict=True))
    question = f"Question: What is the code of the {names[asked]}?\nAnswer: The code of the {names[asked]} is"
    return {"query": f"{context}\n{question}", "answer": str(codes[asked])}
