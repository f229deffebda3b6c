"""What tests of faults share."""

from __future__ import annotations

from functools import lru_cache

import pytest

from gai_yolo.store import catalogue
from gai_yolo.store.manifest import decode


@pytest.fixture
def manifests_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at the same few manifests in thousands of states: the same bytes are not read again."""
    monkeypatch.setattr(catalogue, "decode", lru_cache(decode))
