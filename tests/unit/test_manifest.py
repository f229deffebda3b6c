"""A manifest is believed to the last bit or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gai_yolo.store.manifest import MANIFEST_FORMAT, ForeignManifest, Kind, Manifest, ManifestError, Position, decode, encode, stem_of

EPOCH = Manifest(
    kind="epoch",
    position=Position(step=1234, epoch=7, samples=78_976),
    size=31_415_926,
    sha256="0123456789abcdef" * 4,
    fence=3,
    config_fingerprint="00112233aabbccdd",
    torch_version="2.11.0+cpu",
    time="2026-01-02T03:04:05Z",
    metric=0.4375,
    due=False,
)
STEP = dataclasses.replace(EPOCH, kind="step", position=Position(999, 6, 63_936), metric=None, due=True)

COUNTS = st.integers(0, 10**12)
MANIFESTS = st.builds(
    Manifest,
    kind=st.sampled_from(["epoch", "step"]),
    position=st.builds(Position, COUNTS, COUNTS, COUNTS),
    size=COUNTS,
    sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    fence=COUNTS,
    config_fingerprint=st.text(max_size=16),
    torch_version=st.text(max_size=20),
    time=st.text(max_size=20),
    metric=st.none() | st.floats(0, 1),
    due=st.booleans(),
)


def resealed(changes: dict[str, Any], remove: tuple[str, ...] = ()) -> bytes:
    """A manifest with other content and the checksum that belongs to it, as another program could write it."""
    values = {**json.loads(encode(EPOCH)), **changes}
    values = {key: value for key, value in values.items() if key not in (*remove, "checksum")}
    checksum = hashlib.sha256((json.dumps(values, indent=1) + "\n").encode()).hexdigest()
    return (json.dumps({**values, "checksum": checksum}, indent=1) + "\n").encode()


def test_resealing_nothing_is_what_the_program_writes() -> None:
    """Loss: the tests below are refused for a wrong checksum and show nothing."""
    assert resealed({}) == encode(EPOCH)


@settings(deadline=None)
@given(MANIFESTS)
def test_what_was_written_is_read(manifest: Manifest) -> None:
    """Loss: a good checkpoint that is not recognised, or one believed to be of another step."""
    assert decode(encode(manifest)) == manifest


def test_a_manifest_names_its_file_and_can_be_read_by_people() -> None:
    """Loss: a manifest in one line of numbers that does not say which file it belongs to."""
    text = encode(EPOCH).decode()
    values = json.loads(text)
    assert len(text.splitlines()) > 10 and text.endswith("\n")
    assert (values["format"], values["file"], values["metric"]) == (MANIFEST_FORMAT, "epoch_007.pt", 0.4375)
    assert values["position"] == {"step": 1234, "epoch": 7, "samples": 78_976}
    assert json.loads(encode(STEP))["file"] == "step_00000999.pt"


@pytest.mark.parametrize("manifest", [EPOCH, STEP])
def test_every_single_flipped_bit_is_noticed(manifest: Manifest) -> None:
    """Loss: one bit turns step 1234 into 1235, or the digest into that of another file."""
    whole = encode(manifest)
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ManifestError) as raised:
            decode(bytes(flipped))
        assert not isinstance(raised.value, ForeignManifest), "damage is not taken for another version, which stops the run"


def test_every_truncation_and_everything_appended_is_noticed() -> None:
    """Loss: a manifest that was half on the disk when the power went is believed."""
    whole = encode(EPOCH)
    for length in range(len(whole)):
        with pytest.raises(ManifestError):
            decode(whole[:length])
    for more in (b"\n", b" ", b"\x00", b"x", whole):
        with pytest.raises(ManifestError):
            decode(whole + more)
        with pytest.raises(ManifestError):
            decode(more + whole)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_no_garbage_is_believed_or_ends_in_another_error(garbage: bytes) -> None:
    """Loss: the one pattern of bytes that the parser trips over stops a run that has good checkpoints."""
    with pytest.raises(ManifestError):
        decode(garbage)


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"null", b"7", b'"text"', b"[]", b"{}", b'{"checksum": "x"}', b"NaN", b"1" * 5000, b"[" * 100_000, b'{"a":' * 100_000),
        *('{"checksum": "ÿ"}'.encode("utf-16"), b"\xff\xfe{}", b'{"\\ud800": 1}', bytes(500)),
        json.dumps(json.loads(encode(EPOCH))).encode(),
        encode(EPOCH).replace(b"\n", b"\r\n"),
        encode(EPOCH).replace(b'"due": false', b'"due": false,\n "due": false'),
    ],
    ids=lambda garbage: repr(garbage)[:30].replace("\\", ""),
)
def test_json_that_is_no_manifest_is_damage(garbage: bytes) -> None:
    """Loss: a file that some other tool wrote or rewrote ends in a traceback, or is believed."""
    with pytest.raises(ManifestError) as raised:
        decode(garbage)
    assert not isinstance(raised.value, ForeignManifest)


@pytest.mark.parametrize("version", [MANIFEST_FORMAT + 1, MANIFEST_FORMAT - 1, str(MANIFEST_FORMAT), None])
def test_whole_manifest_in_another_format_is_told_from_a_damaged_one(version: Any) -> None:
    """Loss: an older program passes over the checkpoints of a newer one and trains their steps again."""
    with pytest.raises(ForeignManifest, match="format") as raised:
        decode(resealed({"format": version, "more": 1}))
    assert repr(version) in str(raised.value) and str(MANIFEST_FORMAT) in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({"kind": "best"}, {"kind": None}, {"kind": "step"}, {"file": "epoch_008.pt"}, {"file": 7}),
        *({"size": "31415926"}, {"size": 31415926.0}, {"size": -1}, {"size": None}, {"size": True}, {"fence": -1}),
        *({"sha256": None}, {"sha256": 12}, {"metric": "0.4"}, {"metric": [0.4]}, {"due": 1}, {"due": "false"}, {"due": None}),
        *({"position": 1234}, {"position": [1234, 7, 78_976]}, {"position": {"step": 1234, "epoch": 7}}, {"position": None}),
        *({"position": {"step": "1234", "epoch": 7, "samples": 78_976}}, {"position": {"step": -1, "epoch": 7, "samples": 1}}),
        {"position": {"step": 1234, "epoch": 7, "samples": 78_976, "more": 1}},
        *({"more": 1}, {"format": True}, {"format": 1.0}),
    ],
    ids=str,
)
def test_wrong_types_are_refused_although_the_checksum_fits(changes: dict[str, Any]) -> None:
    """Loss: a size that is a text compares unequal to every file's, far away from where it was read."""
    with pytest.raises(ManifestError):
        decode(resealed(changes))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Manifest) if field.name != "origin"] + ["file"])
def test_manifest_without_a_field_is_refused_although_the_checksum_fits(field: str) -> None:
    """Loss: a manifest without digest that anything fits."""
    with pytest.raises(ManifestError):
        decode(resealed({}, remove=(field,)))


@pytest.mark.parametrize(
    ("kind", "position", "stem"),
    [
        ("epoch", Position(0, 0, 0), "epoch_000"),
        ("epoch", Position(12345, 7, 1), "epoch_007"),
        ("epoch", Position(1, 999, 1), "epoch_999"),
        ("epoch", Position(1, 1000, 1), "epoch_1000"),
        ("epoch", Position(1, 1_234_567, 1), "epoch_1234567"),
        ("step", Position(0, 0, 0), "step_00000000"),
        ("step", Position(100, 7, 1), "step_00000100"),
        ("step", Position(99_999_999, 7, 1), "step_99999999"),
        ("step", Position(123_456_789, 7, 1), "step_123456789"),
    ],
)
def test_names_follow_the_position_and_grow_with_big_numbers(kind: Kind, position: Position, stem: str) -> None:
    """Loss: two checkpoints of a long run under one name."""
    assert stem_of(kind, position) == stem
    assert dataclasses.replace(EPOCH, kind=kind, position=position).stem == stem


def test_positions_are_ordered_by_how_far_training_was() -> None:
    """Loss: the snapshot after an epoch's last step wins over the checkpoint that has its evaluation too."""
    steps_per_epoch, batch = 10, 64
    in_order = []
    for epoch in range(3):
        in_order += [Position(step, epoch, batch * step) for step in range(10 * epoch + 1, 10 * epoch + 11)]
        in_order.append(Position(steps_per_epoch * (epoch + 1), epoch + 1, batch * steps_per_epoch * (epoch + 1)))
    assert all(one < other for one, other in pairwise(in_order))
    assert Position(10, 0, 640) < Position(10, 1, 640) < Position(11, 1, 704)
    assert max([Position(1000, 9, 0), Position(999, 10, 10**9)]) == Position(1000, 9, 0), "numbers, not digits"


def test_a_run_that_began_with_a_file_says_so_and_others_are_written_as_before() -> None:
    """Loss: weights whose licence nobody knows any more; or manifests of older versions that are taken for damaged."""
    own = dataclasses.replace(EPOCH, origin=None)
    assert b"origin" not in encode(own) and decode(encode(own)) == own
    of_others = dataclasses.replace(own, origin="yolo12n.pt, AGPL-3.0")
    assert decode(encode(of_others)) == of_others
