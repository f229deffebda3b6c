"""The command as a whole: what it says of itself, and training under its name."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import gai_yolo
from gai_yolo.cli.main import main, make_parser
from gai_yolo.config import load_config
from gai_yolo.errors import ConfigError
from tests.harness import REPOSITORY, environment, finished, small


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """All that can be asked for, by its words."""
    found = {path: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                found |= commands(one, (*path, name))
    return found


@pytest.mark.parametrize("path", sorted(commands(make_parser())))
def test_every_command_explains_itself(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a help text that fails (a stray % sign), or an option that nobody explains."""
    with pytest.raises(SystemExit) as end:
        main([*path, "--help"])
    assert end.value.code == 0 and "usage: gai-yolo" in capsys.readouterr().out
    unexplained = [action.dest for action in commands(make_parser())[path]._actions if action.option_strings and not action.help]
    assert not unexplained


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: bug reports of nobody knows what."""
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"gai-yolo {gai_yolo.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a script that breaks the shell which reads it."""
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "snapshots" in script and "rollback" in script
    if shutil.which(shell) and shell != "tcsh":
        done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_configurations_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: without a clone there is nothing to give to --config."""
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("bccd")).experiment.name == "bccd"
    assert load_config(Path("configs/config.yaml")).experiment.name == "shapes", "the default, wherever one is"
    with pytest.raises(ConfigError, match=r"--config bcd: there is no such file.*names are bccd, "):
        load_config(Path("bcd"))
    with pytest.raises(ConfigError, match=r"configs/bccd\.yaml: cannot read"):
        load_config(Path("configs/bccd.yaml"))
    Path("bccd").mkdir()
    assert load_config(Path("bccd")).experiment.name == "bccd", "beside its data set"
    Path("bccd").rmdir()
    Path("bccd").write_text("experiment: {name: mine}")
    assert load_config(Path("bccd")).experiment.name == "mine", "a file comes first"


def test_training_under_the_command_s_name(tmp_path: Path, cache: Path) -> None:
    """Loss: a job that trains in a clone only. Away from it, from a fork server that has the job in its memory."""
    arguments = small(tmp_path / "runs", cache, "training.epochs=1")
    words = [sys.executable, "-m", "gai_yolo", "launch", "--", "-m", "gai_yolo", "train", "--config", "config_test_resume", *arguments]
    done = finished(words, {**environment(), "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "run"
    assert (run / "checkpoints" / "epoch_001.pt").is_file()
    assert yaml.safe_load((run / "config.yaml").read_text())["experiment"]["name"] == "run"
