"""The configuration: read from YAML and `--set`, with errors that name the field; compared with a run's own.

It is frozen after loading; everything the job derives from it (learning rates, augmentation phase, step counts) is computed from
it and never written back.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from gai_yolo.config_files import find_config
from gai_yolo.errors import ConfigError, refused_by
from gai_yolo.sections import (
    FIXED,
    LOCAL,
    AugmentConfig,
    DataConfig,
    ElasticConfig,
    EvaluationConfig,
    ExperimentConfig,
    LossConfig,
    ModelConfig,
    ReportingConfig,
    Section,
    SnapshotsConfig,
    TrainingConfig,
)


class Config(Section):
    experiment: ExperimentConfig = ExperimentConfig()
    """Name, folder and seed of the run."""
    model: ModelConfig = ModelConfig()
    """The network."""
    data: DataConfig = DataConfig()
    """The data set and how it is read."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of training images."""
    loss: LossConfig = LossConfig()
    """Gains of the loss terms."""
    training: TrainingConfig = TrainingConfig()
    """Optimisation."""
    snapshots: SnapshotsConfig = SnapshotsConfig()
    """Checkpoints and mid-epoch snapshots: when to save, what to keep."""
    elastic: ElasticConfig = ElasticConfig()
    """Several processes, and changes of their number."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """COCO evaluation."""
    reporting: ReportingConfig = ReportingConfig()
    """What is shown and logged."""

    @property
    def run_folder(self) -> Path:
        """Folder of this run; raises `ConfigError` where `~` has no meaning."""
        return _in_full("experiment.folder", self.experiment.folder) / self.experiment.name

    @property
    def memory_folder(self) -> Path:
        """Of `elastic`; raises `ConfigError` where `~` has no meaning."""
        return _in_full("elastic.memory_folder", self.elastic.memory_folder)

    def dump(self) -> dict[str, Any]:
        """Plain data of the whole configuration, as YAML and checkpoints hold it."""
        return self.model_dump(mode="json")


def _in_full(key_path: str, folder: Path) -> Path:
    try:
        return folder.expanduser()
    except RuntimeError:
        raise ConfigError(f"{key_path} {folder}: there is no home folder for `~`; write it in full.") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML's own loader lets the second of two equal keys win silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} occurs twice", node.value[position][0].start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `key.path=value` overrides.

    Args:
        path: or the name of a configuration that comes with the package.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is impossible.
    """
    path = find_config(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        refusal = ConfigError(f"{path}: cannot read the configuration ({reason}); give an existing YAML file with --config.")
        raise (refused_by(error, refusal) if isinstance(error, OSError) else refusal) from None
    try:
        raw = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({getattr(error, 'problem', None) or 'cannot be parsed'}).") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: the file must hold sections such as `training:`, not a {type(raw).__name__}.")
    _take_texts(raw, yaml.load(text, yaml.BaseLoader))
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, str(path))


def parse_config(raw: dict[str, Any], source: str) -> Config:
    """Validate plain data; `source` is named in errors.

    Raises:
        ConfigError: one sentence for each wrong key or value, with the key's path.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = dict.fromkeys(_sentence(item) for item in error.errors())
        raise ConfigError(f"{source}: {'; '.join(problems)}.") from None


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare two dumped configurations; keys that only one of them knows belong to another version and are passed over.
    Returns key paths whose change makes continuation wrong, and key paths whose change is harmless."""
    flat_old, flat_new = dict(_flatten(old)), dict(_flatten(new))
    differing = [key for key in flat_new if key in flat_old and flat_old[key] != flat_new[key]]
    return [key for key in differing if key in _FIXED_KEYS], [key for key in differing if key not in _FIXED_KEYS]


def fingerprint(config: Config) -> str:
    """16 hexadecimal digits that are equal for configurations under which a run may go on."""
    flat = dict(_flatten(config.dump()))
    fixed = {path: flat[path] for path in _FIXED_KEYS}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def shared_values(config: Config) -> dict[str, Any]:
    """Plain data by dotted key paths: all that the nodes of a job must have in common."""
    flat = dict(_flatten(config.dump()))
    return {path: flat[path] for path, field in fields_of(Config) if field.json_schema_extra != LOCAL}


NO_WEIGHT_FOLLOWS = (
    "experiment.name",
    "experiment.folder",
    "data.path",
    "data.format",
    "data.train.",
    "data.val.",
    "data.max_bad_fraction",
    "data.workers",
    "data.cache",
    "training.device",
    "training.patience",
    "training.time_budget",
    "training.checkpoint_interval",
    "snapshots.",
    "elastic.",
    "evaluation.",
    "reporting.",
)
"""Beginnings of the keys that no weight follows from: where things lie, who computes, what is kept and shown. What the data is made of
has a digest of its own."""


def trajectory_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that the weights follow from, of a settled and dumped configuration, under their key paths."""
    settings = {key: value for key, value in _flatten(config) if not key.startswith(NO_WEIGHT_FOLLOWS)}
    weights = settings.get("model.weights")
    return {**settings, "model.weights": weights and Path(weights).name}


def value_at(dumped: dict[str, Any], key_path: str) -> Any:
    """The value under a dotted key path of a dumped configuration, or None."""
    return dict(_flatten(dumped)).get(key_path)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key_path, separator, text = override.partition("=")
    keys = key_path.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"--set {override}: write it as key.path=value, for example training.epochs=3.")
    try:
        value = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"--set {override}: the value is not valid YAML.") from None
    node = raw
    for depth, key in enumerate(keys[:-1]):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {'.'.join(keys[: depth + 1])} is a value, not a section.")
    if value is not None and ".".join(keys) in _TEXTS:
        value = yaml.load(text, yaml.BaseLoader)
    elif ".".join(keys) in _BY_NAME:
        value = _named(value, yaml.load(text, yaml.BaseLoader))
    node[keys[-1]] = value


def _takes_text(annotation: Any) -> bool:
    """Whether the values of a field are texts or paths, and nothing else."""
    kinds = set(typing.get_args(annotation) or (annotation,)) - {type(None)}
    return kinds <= {str, Path}


def _take_texts(raw: dict[str, Any], texts: dict[str, Any]) -> None:
    """Let a name be what stands in the file, where YAML would read `010`, `yes` or `12:30` as a number or a truth."""
    for key_path in (*_TEXTS, *_BY_NAME):
        *sections, name = key_path.split(".")
        node: Any = raw
        text: Any = texts
        for section in sections:
            node, text = (one.get(section) if isinstance(one, dict) else None for one in (node, text))
        if isinstance(node, dict) and isinstance(text, dict) and node.get(name) is not None:
            if key_path in _BY_NAME:
                node[name] = _named(node[name], text.get(name))
            elif isinstance(text.get(name), str):
                node[name] = text[name]


def _named(value: Any, text: Any) -> Any:
    """A mapping whose names are those that stand in the file; anything else as it is."""
    if isinstance(value, dict) and isinstance(text, dict) and len(value) == len(text) and "<<" not in text:
        return dict(zip(text, value.values(), strict=True))
    return value


def _sentence(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        _, names = _known_part(location[:-1])
        close = difflib.get_close_matches(location[-1], names, n=1)
        hint = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else f"known keys: {', '.join(names)}"
        return f"unknown key {'.'.join(location)} ({hint})"
    # A union such as `int | "auto"` reports one error for each member under a made-up last part; the key is what counts.
    known_path, _ = _known_part(location)
    message = item["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = item["input"]
    shown = f", got {given!r}" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return f"{'.'.join(known_path) or 'the configuration'}: {message}{shown}"


def _known_part(location: Sequence[str]) -> tuple[list[str], list[str]]:
    """The beginning of a place that the configuration has, and the names that may follow there."""
    fields: dict[str, FieldInfo] = Config.model_fields
    known: list[str] = []
    for part in location:
        if part not in fields:
            break
        known.append(part)
        fields = getattr(fields[part].annotation, "model_fields", {})
    return known, list(fields)


def fields_of(section: Any, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The fields of a section, and of those in it, by dotted key paths."""
    for name, field in section.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from fields_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def _flatten(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in _FIELDS:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


_FIELDS = frozenset(path for path, _ in fields_of(Config))
"""Key paths of all values; one may be a mapping."""
_TEXTS = frozenset(path for path, field in fields_of(Config) if _takes_text(field.annotation))
"""Key paths of names and paths."""
_BY_NAME = frozenset(
    path for path, field in fields_of(Config) if any(typing.get_origin(kind) is dict for kind in typing.get_args(field.annotation))
)
"""Key paths of values that may be given by names."""
_FIXED_KEYS = frozenset(path for path, field in fields_of(Config) if field.json_schema_extra == FIXED)
