"""A clock for tests: nobody really waits."""


class Clock:
    """Seconds that pass when somebody waits, and `per_look` at every look; keeps all pauses."""

    def __init__(self, per_look: float = 0.0) -> None:
        self.now, self._per_look = 0.0, per_look
        self.pauses: list[float] = []

    def __call__(self) -> float:
        self.now += self._per_look
        return self.now

    def wait(self, seconds: float) -> None:
        """Passes so many seconds."""
        self.now += seconds
        self.pauses.append(seconds)
