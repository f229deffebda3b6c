"""The documents say what the program does."""

from __future__ import annotations

import re

from tests.config_reference import configuration_reference
from tests.harness import REPOSITORY


def test_configuration_reference_is_up_to_date() -> None:
    """A key that is described wrongly is worse than one that is not described."""
    assert (REPOSITORY / "docs" / "configuration.md").read_text() == configuration_reference()


def test_files_that_the_readme_names_exist() -> None:
    """The first thing a newcomer clicks must not be gone."""
    text = (REPOSITORY / "README.md").read_text()
    links = set(re.findall(r"\]\(([^)#:]+)\)", text))
    configs = set(re.findall(r"configs/[a-z0-9_]+\.yaml", text))
    assert links and configs
    assert [name for name in links | configs if not (REPOSITORY / name).exists()] == []
