"""Weight files of strangers that were made to break what reads them, and unusual ones that are good."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gai_yolo.cli.main import main
from gai_yolo.detector import YOLO12
from gai_yolo.detector.weights import METADATA, load_weights, read_weights
from gai_yolo.errors import CheckpointError

BIAS = "model.21.cv3.0.2.bias"
DEEP = b")" + b"\x85" * 250_000
"""A tuple in a tuple in a tuple ..."""
SHARED = b")" + b"".join(b"q%ch%c\x86" % (place, place) for place in range(40))
"""A tuple that holds another twice, which holds another twice ...: 2^40 items to whoever goes through them."""
OBJECT = b"cultralytics.nn.tasks\nDetectionModel\n)\x81"
MOST_SECONDS, MOST_BYTES = 10, 600 << 20


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(size: str, stride: str, key: str = "0", count: int = 4, kind: str = "FloatStorage") -> bytes:
    """A tensor of a storage; sizes and strides as numbers with blanks between."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    sides, steps = (b"(" + b"".join(number(int(one)) for one in numbers.split()) + b"t" for numbers in (size, stride))
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + sides + steps + b"\x89N" + b"tR"


def holding(**values: bytes) -> bytes:
    """A pickle of a dict."""
    return b"\x80\x02}" + b"".join(text(name) + value + b"s" for name, value in values.items()) + b"."


def network_of(parts: bytes, **more: bytes) -> bytes:
    """A pickle of one stand-in with such attributes."""
    return holding(model=OBJECT + parts + b"b", **more)


def archive(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as target:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            target.writestr(f"a/{name}", data)
        for name, data in (storages or {"0": bytes(16)}).items():
            target.writestr(f"a/data/{name}", data)
    return path


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a file that is no good, in one line, soon, and without much memory."""
    output = path.with_name("out.safetensors")
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["weights", "import", str(path), "--output", str(output)]) == 2
    assert time.process_time() - began < MOST_SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ") and said.endswith("\n") and said[:-1].isprintable(), said
    assert len(said) < len(str(path)) + 500
    assert not output.exists()
    return said


def of_yolo(num_classes: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return YOLO12("debug", num_classes).state_dict()


def set_by_build() -> bytes:
    """`Tensor.set_` on an empty tensor, by its own __setstate__, would make it look at memory that is not its own."""
    return tensor("0", "1", count=4) + b"(" + tensor("0", "1") + b"K\x00(J\x00\x00\x01\x00t(K\x01ttb"


def copies(function: bytes, argument: bytes) -> bytes:
    """A large thing that is copied 20,000 times by three bytes each."""
    return function + b"q\x00" + b"0" + argument + b"q\x01" + b"0(" + b"h\x00h\x01\x85R" * 20_000 + b"l"


PICKLES: dict[str, Callable[[], bytes]] = {
    "deep key": lambda: b"\x80\x02}" + DEEP + b"Ns.",
    "deep keys": lambda: b"\x80\x02}(" + DEEP + b"Nu.",
    "deep key of a dict of marks": lambda: b"\x80\x02(" + DEEP + b"Nd.",
    "deep item of a set": lambda: holding(a=b"\x8f(" + DEEP + b"\x90"),
    "deep item of a frozen set": lambda: holding(a=b"(" + DEEP + b"\x91"),
    "deep item of a set that is called": lambda: holding(a=b"c__builtin__\nset\n(" + DEEP + b"l\x85R"),
    "deep key of an ordered dict": lambda: holding(a=b"ccollections\nOrderedDict\n((" + DEEP + b"N\x86l\x85R"),
    "deep name of a part": lambda: network_of(b"}" + text("_modules") + b"}" + DEEP + b"Nss"),
    "deep value": lambda: holding(model=DEEP),
    "deep call": lambda: holding(a=b"(" + b"ctorch._tensor\n_rebuild_from_type_v2\n" * 9000 + DEEP + b"t"),
    "shared key": lambda: b"\x80\x02}" + SHARED + b"Ns.",
    "shared item": lambda: holding(a=b"\x8f(" + SHARED + b"\x90"),
    "shared class name": lambda: holding(model=b"}", class_names=b"](" + SHARED + b"e"),
    "shared licence": lambda: network_of(b"}", license=SHARED),
    "shared origin": lambda: holding(model=b"}", origin=b"}" + b"".join(text(n) + SHARED + b"s" for n in ("file", "sha256", "licence"))),
    "shared result": lambda: b"\x80\x02" + SHARED + b".",
    "numbers of one hash": lambda: b"\x80\x02}(" + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 150_000)) + b"u.",
    "a changed list": lambda: holding(a=b"]}" + text("__class__") + b"Nsb"),
    "a changed name": lambda: holding(a=b"ctorch\nFloatStorage\n}" + text("name") + text("x") + b"sb"),
    "copies of a list": lambda: holding(a=copies(b"ctorch\nSize\n", b"(" + b"N" * 50_000 + b"l")),
    "copies of a set": lambda: holding(a=copies(b"c__builtin__\nset\n", b"(" + b"".join(number(i) for i in range(50_000)) + b"l")),
    "copies of a text": lambda: holding(a=copies(b"c_codecs\nencode\n", text("x" * 500_000))),
    "copies of attributes": lambda: holding(
        a=b"}(" + b"".join(text(str(i)) + b"N" for i in range(20_000)) + b"uq\x000(" + (OBJECT + b"h\x00b") * 20_000 + b"l"
    ),
    "containers without end": lambda: holding(a=b"(" + b"\x8f" * 5_000_000 + b"l"),
    "many classes": lambda: holding(a=b"(" + b"".join(f"ctorch\nC{i}\n".encode() for i in range(30_000)) + b"l"),
    "a network that holds itself": lambda: network_of(b"}" + text("_modules") + b"}q\x00" + text("x" * 100_000) + b"h\x00ss"),
    "a network of networks": lambda: network_of(
        # a dict of 2,000 children, each of which has that dict
        b"}q\x00" + text("_modules") + b"}q\x01(" + b"".join(text("x" * 400 + str(i)) + OBJECT + b"h\x00b" for i in range(2000)) + b"us"
    ),
    "many dimensions": lambda: holding(model=b"}" + text(BIAS) + tensor("1 " * 60_000, "1 " * 60_000) + b"s"),
    "huge numbers": lambda: holding(model=b"}" + text(BIAS) + tensor(f"{1 << 2000} " * 1000, f"{1 << 2000} " * 1000) + b"s"),
    "a large storage": lambda: holding(model=b"}" + text(BIAS) + tensor("4", "1", count=1 << 60) + b"s"),
    "a storage of two types": lambda: holding(a=tensor("4", "1"), b=tensor("4", "1", kind="IntStorage")),
    "classes without end": lambda: holding(
        model=b"}" + text("model.0.conv.weight") + tensor("1", "1") + b"s" + text(BIAS) + tensor(str(1 << 61), "0") + b"s"
    ),
    "sizes that are bools": lambda: holding(model=b"}" + text(BIAS) + tensor("4", "1").replace(b"K\x00", b"\x88") + b"s"),
    "an array of a size": lambda: holding(a=b"c__builtin__\nbytearray\n" + number(1 << 31) + b"\x85R"),
    "an empty stack": lambda: b"\x80\x02\x86.",
    "a mark too few": lambda: b"\x80\x02u.",
    "no end": lambda: b"\x80\x02}",
    "an extension": lambda: b"\x80\x02\x82\x01.",
    "an instance": lambda: b"(iultralytics.nn\nModel\n.",
}  # fmt: skip


LONG = ("containers without end", *(kind for kind in PICKLES if kind.startswith("deep") and kind not in ("deep key", "deep item of a set")))
"""Hundreds of thousands of opcodes each, some seconds."""


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.exhaustive] * (kind in LONG)) for kind in PICKLES])
def test_a_pickle_that_was_made_to_break_its_reader_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a crash in C, a process that is busy or grows for ever, memory of this process in what is written."""
    pickled = PICKLES[kind]()
    refusal(archive(tmp_path / "bad.pt", pickled), capsys)
    refusal(archive(tmp_path / "bad.pt", pickled[:2] + OBJECT + b"0" + pickled[2:]), capsys)  # which PyTorch does not know


def test_a_tensor_of_no_numbers_gets_none(tmp_path: Path) -> None:
    """Loss: memory of this process, with what is secret in it, among the weights that somebody passes on."""
    for begin in (b"", OBJECT + b"0"):
        pickled = b"\x80\x02" + begin + holding(model=b"}" + text(BIAS) + set_by_build() + b"s")[2:]
        with pytest.raises(CheckpointError, match="damaged"):
            read_weights(archive(tmp_path / "a.pt", pickled))


def test_a_name_in_a_pickle_does_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: an error that clears the screen and prints `ok`."""
    for name in ("\x1b[2Jok", "a" * 100_000, "\u202eko"):
        stack_global = b"\x80\x04}" + text("a") + text("os") + text(name) + b"\x93s."
        assert "names os." in refusal(archive(tmp_path / "a.pt", stack_global), capsys)
        torch.save({**of_yolo(), f"model.0.{name}": torch.zeros(1)}, tmp_path / "b.pt")
        model = YOLO12("debug", 3)
        with pytest.raises(CheckpointError, match="not the weights of a YOLO12-debug") as refused:
            load_weights(model, tmp_path / "b.pt")
        assert str(refused.value).isprintable() and len(str(refused.value)) < 600


# ----------------------------------------------------------------------------------------------------------------- archives


def of_another_size(data: bytes, size: int) -> bytes:
    """An archive whose list says something else of its first part's size."""
    at = data.index(b"PK\x01\x02")
    return data[: at + 24] + struct.pack("<L", size) + data[at + 28 :]


def archives(good: bytes) -> dict[str, bytes]:
    """Archives that `torch.save` does not write."""
    made: dict[str, bytes] = {"something before it": b"\x7fELF" + good, "a comment": good[:-2] + b"\x02\x00hi"}
    for kind, method in {"deflate": zipfile.ZIP_DEFLATED, "bz2": zipfile.ZIP_BZIP2, "lzma": zipfile.ZIP_LZMA}.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(buffer, "w") as target:
            for info in source.infolist():
                target.writestr(info.filename, source.read(info))
            target.writestr("a/data/bomb", bytes(1 << 20), method)
        made[kind] = buffer.getvalue()
        damaged = bytearray(made[kind])
        damaged[made[kind].index(b"a/data/bomb") + 11 :][:8] = b"\xff" * 8
        made[f"{kind}, damaged"] = bytes(damaged)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(buffer, "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
        target.writestr("a/data/blob", bytes(1 << 20))
        blob = target.infolist()[-1]
        for index in range(2000):
            again = zipfile.ZipInfo(f"a/data/blob{index}")
            again.header_offset, again.CRC, again.file_size, again.compress_size = blob.header_offset, blob.CRC, 1 << 20, 1 << 20
            target.filelist.append(again)
        target._didModify = True  # type: ignore[attr-defined]
    made["one part 2,000 times"] = buffer.getvalue()
    encrypted = bytearray(good)
    at = good.index(b"PK\x01\x02")
    encrypted[at + 8] |= 1
    made["encrypted"] = bytes(encrypted)
    made["a part that is larger than it is"] = of_another_size(good, 1 << 30)
    made["a place beyond the end"] = good[: at + 42] + b"\xfe\xff\xff\x7f" + good[at + 46 :]
    list_of_parts = good[at : good.index(b"PK\x05\x06")]
    many = list_of_parts * (20 * (1 << 20) // len(list_of_parts))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, len(many), at, 0)
    made["a list without end"] = good[:at] + many + end
    return made


KINDS_OF_ARCHIVES = [
    *("something before it", "a comment", "deflate", "bz2", "lzma", "deflate, damaged", "bz2, damaged", "lzma, damaged"),
    *("one part 2,000 times", "encrypted", "a part that is larger than it is", "a place beyond the end", "a list without end"),
]


def test_an_archive_that_pytorch_does_not_write_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: kilobytes that become gigabytes, a traceback of a decompressor, a file that is another one to another reader."""
    torch.save(of_yolo(), tmp_path / "torch.pt")
    with zipfile.ZipFile(tmp_path / "torch.pt") as source, zipfile.ZipFile(tmp_path / "good.pt", "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    good = (tmp_path / "good.pt").read_bytes()
    assert len(read_weights(tmp_path / "good.pt").tensors) == len(of_yolo()), "without what is added it is a file like others"
    made = archives(good)
    assert [*made] and sorted(made) == sorted(KINDS_OF_ARCHIVES)
    for kind, data in made.items():
        path = tmp_path / "bad.pt"
        path.write_bytes(data)
        assert "damaged" in refusal(path, capsys), kind


def test_a_file_of_an_old_pytorch_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: storages that the file names and does not hold are memory of this process, and end up in what is written."""
    state = of_yolo()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pt").read_bytes()
    begin = data.rindex(b"\x80\x02]q")
    (tmp_path / "none.pt").write_bytes(data[:begin] + pickle.dumps([], 2))
    for name in ("old.pt", "none.pt"):
        assert "before 1.6" in refusal(tmp_path / name, capsys)


# ------------------------------------------------------------------------------------------------------------------ numbers


def changed(name: str, made: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    state = of_yolo()
    return {**state, name: made(state[name])}


NUMBERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), "not finite"),
    "infinite": (lambda t: t.index_fill(0, torch.tensor([1]), float("inf")), "not finite"),
    "infinite in float32": (lambda t: t.double() + 1e300, "not finite"),
    "integers": (lambda t: t.long(), "int64"),
    "bools": (lambda t: t.bool(), "bool"),
    "complex": (lambda t: t.to(torch.complex64), "Complex"),
    "sparse": (lambda t: t.to_sparse(), "_rebuild_sparse_tensor"),
    "on no device": (lambda t: t.to("meta"), "_rebuild_meta_tensor"),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 1.0, 0, torch.qint8), "QInt8Storage"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_that_a_network_cannot_work_with_are_refused_by_name(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: hours of training on NaN; or a traceback for a tensor of another make."""
    make, says = NUMBERS[kind]
    torch.save(changed(BIAS, make), tmp_path / "a.pt")
    said = refusal(tmp_path / "a.pt", capsys)
    assert says in said and (BIAS in said or "holds a tensor made by" in said)
    model = YOLO12("debug", 3)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=says):
        load_weights(model, tmp_path / "a.pt")
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_more_classes_than_anybody_has_are_no_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a network of any size is built to compare a small file with."""
    torch.save({**of_yolo(), BIAS: torch.zeros(20_000)}, tmp_path / "a.pt")
    assert "not the weights of a YOLO12" in refusal(tmp_path / "a.pt", capsys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_of_every_precision_are_taken(dtype: torch.dtype, tmp_path: Path) -> None:
    """Loss: a refusal of weights that are good; or a network half in float16."""
    state = {name: one.to(dtype) if one.is_floating_point() else one.int() for name, one in of_yolo().items()}
    torch.save(state, tmp_path / "a.pt")
    model = YOLO12("debug", 3)
    assert load_weights(model, tmp_path / "a.pt") == []
    for name, one in model.state_dict().items():
        assert torch.equal(one, state[name].to(one.dtype)) and one.dtype in (torch.float32, torch.int64)


# -------------------------------------------------------------------------------------------------------------- safetensors


def header(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(said: str, rest: bytes) -> bytes:
    return len(said.encode()).to_bytes(8, "little") + said.encode() + rest


def safe_files() -> dict[str, bytes]:
    good = safetensors.torch.save(of_yolo())
    about, numbers = header(good)
    names = sorted((name for name in about if name != "__metadata__"), key=lambda name: about[name]["data_offsets"])
    made: dict[str, bytes] = {}
    for kind, offsets in {"overlapping": [0, 16], "beyond": [0, 1 << 62], "reversed": [16, 0], "negative": [-16, 0]}.items():
        made[kind] = with_header(json.dumps({**about, names[-1]: {**about[names[-1]], "data_offsets": offsets}}), numbers)
    made["a huge shape"] = with_header(json.dumps({**about, names[0]: {**about[names[0]], "shape": [1 << 62, 1 << 62]}}), numbers)
    made["a header of any size"] = (1 << 40).to_bytes(8, "little") + b"{}"
    made["a large header"] = with_header('{"a": [' + "[]," * 4_000_000 + "[]]}", b"")
    made["a deep header"] = with_header("[" * 100_000, b"")
    made["a list"] = with_header("[]", b"")
    made["complex"] = safetensors.torch.save(changed(BIAS, lambda one: one.to(torch.complex64)))
    wrong: dict[str, Any] = {
        "of another kind": 7, "a text": "abc", "numbers": [1, 2, 3], "nothings": [None] * 3, "lists": [["a"]] * 3, "a dict": {"a": "b"},
        "too long": ["a" * 10_000] * 3, "too many": ["a"] * 20_000, "another number": ["a", "b"],
    }  # fmt: skip
    for kind, value in wrong.items():
        made[f"names {kind}"] = safetensors.torch.save(of_yolo(), {METADATA: json.dumps({"class_names": value})})
    for kind, text_of in {"no JSON": "{", "a list": "[1]", "deep": "[" * 100_000, "a number": "7"}.items():
        made[f"metadata {kind}"] = safetensors.torch.save(of_yolo(), {METADATA: text_of})
    return made


def test_a_safetensors_file_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a traceback after the output was written, for names that are numbers."""
    for kind, data in safe_files().items():
        path = tmp_path / "bad.safetensors"
        path.write_bytes(data)
        said = refusal(path, capsys)
        assert any(words in said for words in ("damaged", "class names are", "complex64", "names 2 classes")), (kind, said)


def test_class_names_are_kept_as_they_are_and_shown_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: names that do not fit those of the data any more; or a name that writes to the terminal what it likes."""
    names = ["a\u00a0b", "\x1b[2J\nc" + "d" * 300, "\ud800"]
    torch.save({"model": of_yolo(), "class_names": names}, tmp_path / "a.pt")
    assert main(["weights", "import", str(tmp_path / "a.pt"), "--output", str(tmp_path / "a.safetensors")]) == 0
    said = capsys.readouterr().out
    assert said.removesuffix("\n").isprintable() and len(said) < 400 + len(str(tmp_path))
    assert read_weights(tmp_path / "a.pt").class_names == read_weights(tmp_path / "a.safetensors").class_names == names


def test_a_publisher_cannot_hide_a_licence_behind_an_origin(tmp_path: Path) -> None:
    """Loss: weights that are bound by a licence pass for free ones, because their file says that they came from another."""
    forged = holding(file=text("mine.pt"), sha256=text("0" * 64), licence=text("MIT"))[2:-1]
    for model in (OBJECT + b"}b", b"}"):
        found = read_weights(archive(tmp_path / "a.pt", holding(model=model, license=text("\n\x1bAGPL-3.0\nmore"), origin=forged)))
        assert found.origin is not None and (found.origin.file, found.origin.licence) == ("a.pt", "AGPL-3.0") and found.origin.note
    found = read_weights(archive(tmp_path / "a.pt", holding(model=OBJECT + b"}b", origin=forged)))
    assert found.origin is not None and (found.origin.file, found.origin.licence) == ("a.pt", None)


# --------------------------------------------------------------------------------------------------------------- good ones


def as_views(state: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = torch.cat([one.flatten() for one in state.values() if one.is_floating_point()])
    made, at = dict(state), 0
    for name, one in state.items():
        if one.is_floating_point():
            made[name] = whole[at : at + one.numel()].view(one.shape)
            at += one.numel()
    return made


def turned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.contiguous(memory_format=torch.channels_last) if one.dim() == 4 else one for name, one in state.items()}


def tied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    last = [name for name in state if name.endswith("running_mean")]
    shape = state[last[0]].shape
    return {name: state[last[0]] if name in last and one.shape == shape else one for name, one in state.items()}


def with_attribute(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {name: one.clone() for name, one in state.items()}
    made[BIAS].note = "of a program"  # type: ignore[attr-defined]
    return made


def with_more(state: dict[str, Tensor]) -> dict[str, Any]:
    """As a training of others saves it."""
    optimizer = {
        "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)}},
        "param_groups": [{"betas": (0.9, 0.99), "params": [0]}],
    }
    more = {"schedule": {"milestones": Counter([1, 2])}, "size": torch.Size([1]), "device": torch.device("cpu"), "dtype": torch.float16}
    return {"state_dict": state, "epoch": 3, "optimizer": optimizer, **more}


GOOD: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "state dict": lambda _: YOLO12("debug", 3).state_dict(),
    "plain": dict,
    "ordered": OrderedDict,
    "half": lambda s: {name: one.half() if one.is_floating_point() else one for name, one in s.items()},
    "bfloat16": lambda s: {name: one.bfloat16() if one.is_floating_point() else one for name, one in s.items()},
    "parameters": lambda s: {name: nn.Parameter(one) if one.is_floating_point() else one for name, one in s.items()},
    "views of one storage": as_views,
    "channels last": turned,
    "tied": tied,
    "attributes": with_attribute,
    "a checkpoint": lambda s: {"format": 3, "model_state_dict": s, "ema_state_dict": s, "rng": torch.get_rng_state(), "history": [{}]},
    "with an optimizer": with_more,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "protocol"), [*((kind, 2) for kind in GOOD), ("with an optimizer", 4)])
def test_a_good_file_gives_the_bits_that_pytorch_gives(kind: str, protocol: int, tmp_path: Path) -> None:
    """Loss: a reader of our own that reads something else than was saved."""
    path, output = tmp_path / "a.pt", tmp_path / "a.safetensors"
    content = GOOD[kind](of_yolo())
    torch.save(content, path, pickle_protocol=protocol)
    torch.save(content, tmp_path / "b.pt")
    expected = torch.load(tmp_path / "b.pt", weights_only=True)
    expected = expected.get("ema_state_dict") or expected.get("state_dict") or expected
    found = read_weights(path)
    assert found.tensors.keys() == expected.keys() and len(expected) > 100 and found.origin is None
    for name, one in found.tensors.items():
        assert torch.equal(one, expected[name]) and (one.dtype, one.stride()) == (expected[name].dtype, expected[name].stride()), name
    assert main(["weights", "import", str(path), "--output", str(output)]) == 0
    again = read_weights(output).tensors
    assert again.keys() == expected.keys() and all(torch.equal(one, expected[name]) for name, one in again.items())


# ------------------------------------------------------------------------------------------------------------------- output


def test_an_output_is_a_file_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: an error about a file that nobody knows; a link, a folder or a pipe that is gone."""
    torch.save(of_yolo(), tmp_path / "a.pt")
    for name in ("folder", "link", "pipe"):
        (tmp_path / name).mkdir()
    folder, link, pipe = (tmp_path / name / "a.safetensors" for name in ("folder", "link", "pipe"))
    folder.mkdir()
    link.symlink_to("nowhere")
    os.mkfifo(pipe)
    nowhere, long = tmp_path / "no" / "a.safetensors", tmp_path / ("a" * 240 + ".safetensors")
    for output, more, says in (
        (folder, [], "is there already"),
        (folder, ["--overwrite"], "is a folder or a device"),
        (pipe, ["--overwrite"], "is a folder or a device"),
        (link, [], "is there already"),
        (nowhere, [], "cannot be written (No such file"),
        (long, [], "cannot be written (File name too long"),
    ):
        assert main(["weights", "import", str(tmp_path / "a.pt"), "--output", str(output), *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {output}: ") and says in said and said.count("\n") == 1 and ".tmp" not in said
    assert folder.is_dir() and link.is_symlink() and pipe.is_fifo()
    os.mkfifo(tmp_path / "pipe.pt")
    assert "no file" in refusal(tmp_path / "pipe.pt", capsys)
