"""How much of an evaluation is left, over models, caches and tasks."""

from collections import Counter
from collections.abc import Iterable
from statistics import mean


class Progress:
    """
    Args:
        tasks (`Iterable[str]`): Names of the tasks of all measurements, a name for each model and cache.
    """

    def __init__(self, tasks: Iterable[str]):
        self.left = Counter(tasks)
        self.total = self.left.total()
        self.seconds: dict[str, float] = {}  # of each task, when it was last measured

    def done(self, task: str, seconds: float) -> None:
        self.left[task] -= 1
        self.seconds[task] = seconds

    def seconds_left(self) -> float | None:
        """As long as each task took before, and as the others took on average where it was not measured yet; None
        where nothing was."""
        if not self.seconds:
            return None
        usual = mean(self.seconds.values())
        return sum(count * self.seconds.get(task, usual) for task, count in self.left.items())

    def describe(self) -> str:
        """The measurement that begins, and the time for it and all that follow: "measurement 3 of 12, 5 min left"."""
        place, seconds = f"measurement {self.total - self.left.total() + 1} of {self.total}", self.seconds_left()
        return place if seconds is None else f"{place}, about {in_words(seconds)} left"


def in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
