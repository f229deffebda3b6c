"""torchrun's rendezvous state in a key-value store, as JSON.

torchrun keeps its state as a pickle, and a pickle can run code in whoever reads it. Here the state travels in a form of our own with a
strict schema. torchrun asks its backend for a pickle all the same; it gets one that this very process has made, of fields that it has
checked.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Annotated, Any

import torch
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousStateError, dynamic_rendezvous
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend

from gai_yolo.launcher.rendezvous.key_values import KeyValueStore

STATE_FIELDS = {"round", "complete", "deadline", "closed", "participants", "wait_list", "redundancy_list", "last_heartbeats"}
NODE_FIELDS = {"addr", "pid", "local_id"}
"""What there is in PyTorch 2.11 to 2.15."""
KNOWN_TORCH = "install 2.11 to 2.15, or a newer gai-yolo."


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, from_attributes=True)


class _Node(_Part):
    addr: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[\w.:%-]+$")]
    pid: NonNegativeInt
    local_id: NonNegativeInt


_Nodes = Annotated[list[_Node], Field(max_length=100_000)]


class _State(_Part):
    round: NonNegativeInt
    complete: bool
    deadline: AwareDatetime | None
    closed: bool
    participants: Annotated[list[tuple[_Node, int]], Field(max_length=100_000)]
    wait_list: _Nodes
    redundancy_list: _Nodes
    last_heartbeats: Annotated[list[tuple[_Node, AwareDatetime]], Field(max_length=100_000)]


def unknown_torch() -> str | None:
    """Why this PyTorch's rendezvous cannot be used, for people; None: it can."""
    try:
        known = vars(dynamic_rendezvous._RendezvousState()).keys() == STATE_FIELDS
        known = known and dynamic_rendezvous._NodeDesc.__dataclass_fields__.keys() == NODE_FIELDS
    except (AttributeError, TypeError):
        known = False
    if known:
        return None
    return f"PyTorch {torch.__version__} keeps a rendezvous state that is not known here; {KNOWN_TORCH}"


def encode(state: Any) -> bytes:
    """JSON of torchrun's state."""
    content = _State(
        round=state.round,
        complete=state.complete,
        deadline=state.deadline,
        closed=state.closed,
        participants=list(state.participants.items()),
        wait_list=sorted(state.wait_list),
        redundancy_list=sorted(state.redundancy_list),
        last_heartbeats=list(state.last_heartbeats.items()),
    )
    return content.model_dump_json().encode()


def decode(data: bytes) -> Any:
    """The way back.

    Raises:
        ValueError: it is no such JSON.
    """
    content = _State.model_validate_json(data)
    state = dynamic_rendezvous._RendezvousState()
    state.round, state.complete, state.deadline, state.closed = content.round, content.complete, content.deadline, content.closed
    state.participants = {_desc(node): rank for node, rank in content.participants}
    state.wait_list = {_desc(node) for node in content.wait_list}
    state.redundancy_list = {_desc(node) for node in content.redundancy_list}
    state.last_heartbeats = {_desc(node): at for node, at in content.last_heartbeats}
    return state


class StateBackend(RendezvousBackend):
    """Where torchrun keeps its state of a run."""

    def __init__(self, store: KeyValueStore, run: str) -> None:
        self._store, self._key = store, f"torch.rendezvous.{run}"

    @property
    def name(self) -> str:
        return "gai-yolo"

    def get_state(self) -> tuple[bytes, Any] | None:
        """See the base class; the token is the value itself."""
        with _reached():
            (value,) = self._store.read([self._key])
        return (_pickled(value), value) if value else None

    def set_state(self, state: bytes, token: Any | None = None) -> tuple[bytes, Any, bool] | None:
        """See the base class; `state` is a pickle that torchrun has just made in this process."""
        wanted = encode(pickle.loads(state))
        with _reached():
            value = self._store.swap(self._key, token or b"", wanted)
        return (_pickled(value), value, value == wanted) if value else None


def _pickled(value: bytes) -> bytes:
    try:
        return pickle.dumps(decode(value))
    except ValidationError as error:
        raise RendezvousStateError(f"the rendezvous holds no state of torchrun ({error.error_count()} faults)") from None


def _desc(node: _Node) -> Any:
    return dynamic_rendezvous._NodeDesc(node.addr, node.pid, node.local_id)


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise RendezvousConnectionError("the key-value store cannot be reached") from error
