"""What is wrong in a data set and was mended or left out: counted by kind."""

from __future__ import annotations

from pathlib import Path

from gai_yolo.data.index import Problem, Sighting

MOST_SIGHTINGS = 12
"""Records of one kind that are kept to be looked at."""


class Problems:
    """Counts what is wrong in a split, by kind, and keeps the first example of each; of those about an image, the first few."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[int, str]] = {}
        self._seen: dict[tuple[str, str], list[Sighting]] = {}
        self.num_bad_images = 0
        self.first_bad = ""

    def add(
        self,
        kind: str,
        example: str,
        action: str,
        path: Path | None = None,
        corners: tuple[float, ...] = (),
        fractions: bool = False,
    ) -> None:
        """Count one; `example` is kept if it is the first of its kind. What it is about: image and box, as of a `Sighting`."""
        count, first = self._found.get((kind, action), (0, example))
        self._found[kind, action] = (count + 1, first)
        seen = self._seen.setdefault((kind, action), [])
        if path is not None and len(seen) < MOST_SIGHTINGS:
            seen.append(Sighting(example, path, corners, fractions))

    def add_bad_image(self, kind: str, example: str, path: Path | None = None) -> None:
        """Count one image that cannot be used; these are held against `max_bad_fraction`."""
        self.add(kind, example, "image skipped", path)
        self.num_bad_images += 1
        self.first_bad = self.first_bad or f"{kind}: {example}"

    def freeze(self) -> tuple[Problem, ...]:
        """All kinds, in the order in which they were first seen."""
        return tuple(
            Problem(kind, count, example, action, tuple(self._seen[kind, action]))
            for (kind, action), (count, example) in self._found.items()
        )
