"""What is wrong in a data set and was mended or left out: counted by kind."""

from __future__ import annotations

from gai_yolo.data.index import Problem


class Problems:
    """Counts what is wrong in a split, by kind, and keeps the first example of each."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[int, str]] = {}
        self.num_bad_images = 0
        self.first_bad = ""

    def add(self, kind: str, example: str, action: str) -> None:
        """Count one; `example` is kept if it is the first of its kind."""
        count, first = self._found.get((kind, action), (0, example))
        self._found[kind, action] = (count + 1, first)

    def add_bad_image(self, kind: str, example: str) -> None:
        """Count one image that cannot be used; these are held against `max_bad_fraction`."""
        self.add(kind, example, "image skipped")
        self.num_bad_images += 1
        self.first_bad = self.first_bad or f"{kind}: {example}"

    def freeze(self) -> tuple[Problem, ...]:
        """All kinds, in the order in which they were first seen."""
        return tuple(Problem(kind, count, example, action) for (kind, action), (count, example) in self._found.items())
