"""torchrun's rendezvous on a store of ours."""

from __future__ import annotations

import sys

import pytest
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from gai_yolo.launcher.rendezvous.handler import name_methods_at_once


def record() -> str:
    """As torchrun's own functions do that want to know who has called them."""
    name: str = dynamic_rendezvous.get_method_name()
    return name


def caller() -> str:
    return record()


def test_methods_are_named_as_torchrun_does_without_a_walk_over_all_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: workers wait a second of each restart for a name in a log; or the log has another."""
    monkeypatch.setattr(dynamic_rendezvous, "get_method_name", dynamic_rendezvous.get_method_name)  # is put back
    assert caller() == "caller"
    name_methods_at_once()
    monkeypatch.setattr(sys, "modules", None)  # whoever goes through them fails
    found = caller()
    monkeypatch.undo()
    assert found == "caller"
