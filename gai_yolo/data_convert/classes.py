"""A class map: classes that get another name, become one, or are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from gai_yolo.data.formats.check import Problems
from gai_yolo.data.formats.reading import Doubt, is_text, read_text
from gai_yolo.data.index import Category, ImageRecord, Index, Records
from gai_yolo.errors import DataError

DROPPED = "-"
ALL_OTHERS = "*"


@dataclass(frozen=True)
class ClassMap:
    """What becomes of classes, by their names; those that are not named stay, unless there is an entry `*`."""

    new: dict[str, str]
    """Another name, or `-` for none."""
    source: str
    """For messages."""
    all_must_be_there: bool
    """Whether a name that no class has is a mistake; a file may serve several data sets."""

    def of(self, name: str) -> str | None:
        """The new name; None if the class is left out."""
        found = self.new.get(name, self.new.get(ALL_OTHERS, name))
        return None if found == DROPPED else found


def class_map(entries: Sequence[str], file: Path | None) -> ClassMap | None:
    """From the command line (`OLD=NEW`, `OLD=-`), or a YAML file of such pairs; None if there is neither.

    Raises:
        DataError: an entry says nothing, or two say different things.
    """
    if file is not None:
        return ClassMap(_read(file), str(file), all_must_be_there=False)
    new: dict[str, str] = {}
    for entry in entries:
        old, _, name = entry.partition("=")
        if entry.count("=") != 1 or not is_text(old) or not is_text(name):
            raise DataError(f"--map {entry}: write OLD=NEW, or OLD=- to leave a class out; names with `=` need --classes FILE.yaml.")
        if new.setdefault(old, name) != name:
            raise DataError(f"--map {entry}: {old} is mapped to {new[old]} as well; give one of them.")
    return _checked(ClassMap(new, "--map", all_must_be_there=True)) if new else None


def _read(file: Path) -> dict[str, str]:
    text = read_text(file, "class map", Doubt())
    try:
        content = yaml.load(text, yaml.BaseLoader)  # all scalars are texts: a class may be called `yes`
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise DataError(f'{where}: not valid YAML; write lines `old: new`, and `old: "-"` to leave a class out.') from None
    if not isinstance(content, dict) or not content:
        raise DataError(f'{file}: a class map has lines `old: new`, and `old: "-"` to leave a class out.')
    for old, new in content.items():
        if not is_text(old) or not isinstance(new, str) or (new and not is_text(new)):
            raise DataError(f"{file}: the entry {old!r} needs a class name, or `-` to leave it out.")
    return _checked(ClassMap({old: new or DROPPED for old, new in content.items()}, str(file), False)).new


def _checked(found: ClassMap) -> ClassMap:
    other = found.new.get(ALL_OTHERS, DROPPED)
    if other != DROPPED:
        raise DataError(f"{found.source}: `*` stands for all other classes, which can only be left out (`-`), not become {other!r}.")
    return found


def mapped(index: Index, classes: ClassMap, problems: Problems) -> Index:
    """The index with other classes, in the order in which the old ones lead to them; a class keeps the id of the first that it comes from.

    Raises:
        DataError: an entry is of no class, or no class is left.
    """
    _refuse_unknown(index, classes, problems)
    found: dict[str, int] = {}
    categories: list[Category] = []
    table: list[int] = []
    for category in index.categories:
        name = classes.of(category.name)
        if name is not None and name not in found:
            found[name] = len(categories)
            categories.append(Category(category.id, name))
        table.append(-1 if name is None else found[name])
    if not categories:
        raise DataError(f"{classes.source}: no class of {index.source} is left; keep one.")
    counts = np.bincount(index.images.classes, minlength=len(index.categories)).tolist()
    for category, position, count in zip(index.categories, table, counts, strict=True):
        new = None if position < 0 else categories[position].name
        if new != category.name:
            action = "left out" if new is None else f"called {new}"
            problems.add_many(f"box of the class {category.name}", count, index.source, f"{action}, as {classes.source} says")
    return replace(index, categories=tuple(categories), images=Records.of(_relabelled(index.images, np.array(table))))


def _refuse_unknown(index: Index, classes: ClassMap, problems: Problems) -> None:
    unknown = [name for name in classes.new if name != ALL_OTHERS and name not in index.class_names]
    if unknown and classes.all_must_be_there:
        known = ", ".join(index.class_names[:20]) + (", ..." if len(index.class_names) > 20 else "")
        raise DataError(f"{classes.source}: {index.source} has no class {unknown[0]!r}, but {known}.")
    for name in unknown:
        problems.add("entry of the class map for a class that is not there", name, "no effect")


def _relabelled(images: Records, table: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Iterator[ImageRecord]:
    for image in images:
        classes = table[image.classes]
        kept = classes >= 0
        yield replace(image, boxes=image.boxes[kept], classes=classes[kept], crowd=image.crowd[kept], areas=image.areas[kept])
