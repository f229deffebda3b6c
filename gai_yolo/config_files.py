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
    if path.exists() or (path != DEFAULT and (path.suffix or len(path.parts) > 1)):
        return path
    known = {file.stem: file for folder in CONFIG_FOLDERS for file in sorted(folder.glob("*.yaml"))}
    name = path.stem if path == DEFAULT else str(path)
    if name not in known:
        raise ConfigError(f"--config {path}: there is no such file, and no configuration of that name; names are {', '.join(known)}.")
    return known[name]


CONFIG_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
"""In a wheel, and in a clone."""
