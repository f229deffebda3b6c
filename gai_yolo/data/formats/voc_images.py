"""Which image a VOC xml is of, and which images nobody has annotated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path, PurePath, PurePosixPath

from gai_yolo.data.formats.check import Split
from gai_yolo.data.formats.folders import IMAGE_SUFFIXES, Folders, is_picture, plain_name
from gai_yolo.data.formats.voc_xml import Place, VocFile, place_in
from gai_yolo.errors import DataError

Names = frozenset[str]


def names_of(path: PurePath, bare: bool) -> Names:
    """What a list may call a file, given its path below the folder of all that are like it: with its folders, without the split's, or,
    where the list names no folders (`bare`), without any."""
    place, stem = place_in(path), path.stem
    return frozenset(plain_name(str(PurePosixPath(*parts, stem))) for parts in (path.parts[:-1], place.folder, *([()] if bare else [])))


def is_bare(names: Iterable[str]) -> bool:
    """Whether a list names files without their folders."""
    return not any("/" in name for name in names)


class VocImages:
    """The image files of a folder; of that and those below, unless it is the data set's own.

    Args:
        split: images in a folder below that is named after another split are not among them.
    """

    def __init__(self, folder: Path, root: Path, split: Split, folders: Folders) -> None:
        found = sorted(folder / name for name in folders.names(folder)) if folder == root else folders.files_under(folder)
        self.folder = folder
        self.places = {path: place_in(path.relative_to(folder)) for path in found if is_picture(path.name)}
        self.places = {path: place for path, place in self.places.items() if place.split in (None, split)}
        self.all = [path for path in self.places if path.suffix.lower() in IMAGE_SUFFIXES]
        self.others = [path for path in self.places if path.suffix.lower() not in IMAGE_SUFFIXES]
        """Of a kind that is not read."""
        self._by_stem: dict[str, list[Path]] = {}
        self._by_name: dict[str, list[Path]] = {}
        for path in self.all:
            self._by_stem.setdefault(plain_name(path.stem), []).append(path)
            self._by_name.setdefault(plain_name(path.name), []).append(path)

    def of(self, files: Iterable[tuple[VocFile, Place]]) -> dict[Path, Path]:
        """The images of some xml files, by the paths of these. Only names that the listing has are taken, so that an xml cannot lead out
        of the folder.

        The xml's own name comes first, because tools leave a `filename` without suffix, or of before a renaming; of `1.jpg` and `1.png` it
        says which. Of images of one name that lies in the folder that the xml's folder stands for.

        Raises:
            DataError: nothing says which of several an xml is of.
        """
        files = list(files)
        found: dict[Path, Path] = {}
        for by in (self._by_stem, self._by_name):  # of `1.jpg` the xml is `1.xml` or `1.jpg.xml`
            taken = set(found.values())
            for file, place in files:
                if file.path not in found and (image := self._beside(file, place, by, taken)):
                    found[file.path] = image
        # One beside a taken one of the same name is nobody's: the xml that says what is in it is that one's.
        taken = {path for image in found.values() for path in self._by_stem[plain_name(image.stem)] if path.parent == image.parent}
        left = [file for file, _ in files if file.path not in found]
        stems = {plain_name(file.path.stem) for file, _ in files}
        for file in left:
            own = self._by_stem.get(plain_name(file.path.stem)) or self._by_name.get(plain_name(file.path.stem), [])
            own = [path for path in own if path not in taken]
            free = [path for path in self._named(file) if path not in taken and not {plain_name(path.stem), plain_name(path.name)} & stems]
            if image := self._only(file, own or free):
                found[file.path] = image
        self._refuse_shared(found, left)
        return found

    def _beside(self, file: VocFile, place: Place, images: dict[str, list[Path]], taken: Set[Path]) -> Path | None:
        folder = [*map(plain_name, place.folder)]
        same = [path for path in images.get(plain_name(file.path.stem), []) if path not in taken]
        return _best(file, [path for path in same if [*map(plain_name, self.places[path].folder)] == folder])

    def _named(self, file: VocFile) -> list[Path]:
        name = plain_name(PurePosixPath(file.file_name.replace("\\", "/")).name)
        return self._by_name.get(name) or self._by_stem.get(plain_name(Path(name).stem), [])

    def _only(self, file: VocFile, images: Sequence[Path]) -> Path | None:
        if len({path.parent for path in images}) > 1:
            raise DataError(
                f"{file.path}: may be of {images[0]} or of {images[1]}; let xml and images lie in folders of the same names, below "
                f"that of all xml and {self.folder}."
            )
        return _best(file, images)

    def _refuse_shared(self, found: dict[Path, Path], files: Sequence[VocFile]) -> None:
        first: dict[Path, Path] = {}
        for file in files:
            image = found.get(file.path)
            if image is not None and (other := first.setdefault(image, file.path)).parent != file.path.parent:
                raise DataError(
                    f"{image}: may be of {other} or of {file.path}; let xml and images lie in folders of the same names, below that of "
                    f"all xml and {self.folder}."
                )

    def unused(self, chosen: Set[Path], named: Names | None) -> list[Path]:
        """Those that are not chosen, although they could be: beside one of the same name that is; and unless `named` is None those that
        nobody names."""
        beside = {(self.places[path], plain_name(path.stem)) for path in chosen}
        left = self.places.keys() - chosen
        unknown = set() if named is None else left - set(self.named(left, named))
        shadowed = [path for path in left if (self.places[path], plain_name(path.stem)) in beside]
        return sorted({*unknown, *shadowed})

    def named(self, paths: Iterable[Path], names: Names) -> Iterator[Path]:
        """Those that a list means."""
        bare = is_bare(names)
        for path in paths:
            inside = path.relative_to(self.folder)
            if any(names_of(one, bare) & names for one in (inside, inside.with_name(f"{inside.name}.xml"))):
                yield path


def _best(file: VocFile, images: Sequence[Path]) -> Path | None:
    name = plain_name(PurePosixPath(file.file_name.replace("\\", "/")).name)
    return next((path for path in images if plain_name(path.name) == name), images[0] if images else None)
