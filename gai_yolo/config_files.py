"""Configuration files that come with the package, by name: where there is no clone of the repository."""

from __future__ import annotations

from pathlib import Path

from gai_yolo.errors import ConfigError

DEFAULT = Path("configs/config.yaml")
"""What `--config` is where nothing is said; without such a file, the one of the package."""


def find_config(path: Path) -> Path:
    """The file that `--config` means: a path, or the name of a configuration of the package, such as `bccd`.

    Raises:
        ConfigError: a name that is none.
    """
    is_name = path == DEFAULT or (not path.suffix and len(path.parts) == 1)
    # A folder of that name may well lie here: the data set that the configuration is for.
    if not is_name or (path.exists() and not path.is_dir()):
        return path
    known = {file.stem: file for file in sorted(packaged().glob("*.yaml"))}
    name = path.stem if path == DEFAULT else str(path)
    if name not in known:
        raise ConfigError(f"--config {path}: there is no such file, and no configuration of that name; names are {', '.join(known)}.")
    return known[name]


def packaged() -> Path:
    """The folder of the configurations: in a wheel the package's own, beside which those of other packages may lie, or the clone's."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"
