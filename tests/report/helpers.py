"""Made-up results of a run."""

LAYERS = 7


def made_distances(layers: int) -> list[list[float]]:
    return [[abs(a - b) / layers / 2 + (0.01 * min(a, b) if a != b else 0) for b in range(layers)] for a in range(layers)]


def made_layers(layers: int) -> dict[str, list[float]]:
    return {
        "block_influence": [0.9 / (layer + 1) for layer in range(layers)],
        "mean_norm": [50.0 + layer for layer in range(layers)],
        "max_norm": [100.0 * 3**layer for layer in range(layers)],
    }
