"""How long to wait after failures in a row; a decision, without clock or chance."""


def backoff_seconds(
    first: float, longest: float, failures: int, draw: float, factor: float = 2.0
) -> float:
    """Seconds to wait after `failures` ≥ 1 in a row: half of the full delay, or up to all of it.

    The full delay begins with `first` and grows by `factor` up to `longest`. `draw` in [0, 1) keeps
    those who lost the same coordinator from coming back all at once.
    """
    growth = factor ** min(failures - 1, 64)
    return min(longest, first * growth) * (1 + draw) / 2
