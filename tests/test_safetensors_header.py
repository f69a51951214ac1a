"""What is told of a safetensors file, and of every other file that is sent in its place."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from sdxl_worker.safetensors_header import (
    MAX_HEADER_BYTES,
    NotSafetensorsError,
    header_end,
    parse_header,
    read_header,
)

DATA = save(
    {
        "a": torch.zeros(2, 3, dtype=torch.float16),
        "b": torch.zeros(4, dtype=torch.bfloat16),
        "alpha": torch.tensor(4.0),
        "none": torch.zeros(0, 5),
        "eight": torch.zeros(3, dtype=torch.float8_e4m3fn),
    },
    {"ss_network_dim": "4"},
)


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: Any, end: Any, shape: Any, dtype: Any = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(NotSafetensorsError) as caught:
        read_header(path)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def test_what_the_library_writes_is_read(path: Path) -> None:
    path.write_bytes(DATA)
    header = read_header(path)
    assert header.metadata == {"ss_network_dim": "4"}
    assert header.shapes == {"a": (2, 3), "b": (4,), "alpha": (), "none": (0, 5), "eight": (3,)}
    dtypes = {"a": "F16", "b": "BF16", "alpha": "F32", "none": "F32", "eight": "F8_E4M3"}
    assert header.dtypes == dtypes
    assert header.file_bytes == len(DATA)
    begin, end = header.offsets["alpha"]
    assert np.frombuffer(DATA[begin:end], "<f4") == [4.0]


def test_a_header_is_read_from_a_file_s_first_bytes() -> None:
    """Its size is known before its tensors have come."""
    end = header_end(DATA[:1024])
    assert parse_header(DATA[:end]).file_bytes == len(DATA)


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"weights")
    return buffer.getvalue()


def torch_saved(*, as_zip: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer, _use_new_zipfile_serialization=as_zip)
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 1234\n" % (b"0" * 64)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "a web page, perhaps one to log in"),
        (b"\xef\xbb\xbf\n  <HTML lang=en>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
        (b'{"error":"Unauthorized"}', "JSON, perhaps a server's error message"),
        (b'["no"]', "JSON"),
        (torch_saved(as_zip=True), "a PyTorch pickle"),
        (torch_saved(as_zip=False), "a PyTorch pickle"),
        (pickle.dumps({"a": 1}), "a PyTorch pickle"),
        (zipped("lora.safetensors"), "an archive: unpack it"),
        (b"\x1f\x8b" + bytes(30), "an archive"),
        (POINTER, "a Git LFS pointer"),
        (b"GGUF\3\0\0\0" + bytes(30), "a GGUF file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "a picture"),
        (bytes(7), "damaged, or not a safetensors file"),
        (np.random.default_rng(0).bytes(5000), "damaged, or not a safetensors file"),
    ],
)
def test_what_it_is_instead_is_named(path: Path, data: bytes, what: str) -> None:
    assert refusal(path, data).startswith(what)


@pytest.mark.parametrize(
    ("header", "data", "why"),
    [
        (b"[1, 2]", b"", "length is wrong"),
        (b'{"a": ', b"", "no JSON"),
        (b'{"a": \xff}', b"", "no JSON"),
        (b'{"a":' * 5000, b"", "no JSON"),
        ({"__metadata__": {"a": 1}}, b"", "metadata"),
        ({"__metadata__": ["a"]}, b"", "metadata"),
        ({"a": 1}, b"", "wrongly"),
        ({"a": {"dtype": "F16", "shape": [1]}}, b"", "wrongly"),
        ({"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2, 3]}}, b"12", "wrongly"),
        ({"a": tensor(0, 2, [1.0])}, b"12", "wrongly"),
        ({"a": tensor(0, 2, 1)}, b"12", "wrongly"),
        ({"a": tensor(0, 2, [True])}, b"12", "wrongly"),
        ({"a": tensor(0, "2", [1])}, b"12", "wrongly"),
        ({"a": tensor(-2, 0, [1])}, b"12", "wrongly"),
        ({"a": tensor(0, 2, [-1, -1])}, b"12", "wrongly"),
        ({"a": tensor(0, 2, [1] * 65)}, b"12", "wrongly"),
        ({"a": tensor(0, 2, [0, 2**200])}, b"12", "wrongly"),
        ({"a": tensor(0, 2, [1], "F17")}, b"12", "number format"),
        ({"a": tensor(0, 2, [1], ["F16"])}, b"12", "number format"),
        ({"a": tensor(0, 2, [2])}, b"12", "a tensor's size"),
        ({"a": tensor(2, 0, [0])}, b"12", "a tensor's size"),
        ({"a": tensor(0, 4, [2]), "b": tensor(2, 6, [2])}, b"123456", "overlap, or have gaps"),
        ({"a": tensor(0, 4, [2]), "b": tensor(0, 4, [2])}, b"1234", "overlap, or have gaps"),
        ({"a": tensor(0, 2, [1]), "b": tensor(4, 6, [1])}, b"123456", "overlap, or have gaps"),
        ({"a": tensor(2, 4, [1])}, b"1234", "overlap, or have gaps"),
        ({"a": tensor(0, 2, [1])}, b"123", "1 bytes follow its last tensor"),
    ],
)
def test_a_damaged_file_is_told(path: Path, header: Any, data: bytes, why: str) -> None:
    told = refusal(path, with_header(header, data))
    assert why in told


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 100 * 1024**3, 2**63, 2**64 - 1])
def test_a_header_is_not_read_because_it_says_that_it_is_large(path: Path, length: int) -> None:
    told = refusal(path, length.to_bytes(8, "little") + b'{"a": 1}' + bytes(100))
    assert "length is wrong" in told


@pytest.mark.parametrize("there", [9, 100, len(DATA) - 1])
def test_a_file_that_is_cut_off_is_told(path: Path, there: int) -> None:
    assert refusal(path, DATA[:there]).startswith(f"cut off: it has {there} ")


def test_a_number_format_of_less_than_a_byte_is_counted_in_bits(path: Path) -> None:
    path.write_bytes(with_header({"a": tensor(0, 3, [2, 3], "F4")}, b"123"))
    assert read_header(path).dtypes == {"a": "F4"}
