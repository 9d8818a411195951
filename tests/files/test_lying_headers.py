"""Safetensors headers that are cut off, lie or are no headers: said by name, at once, unread."""

import copy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

import hf_lora
from hf_lora.files.safetensors_io import TensorFile, serialize
from tests import tiny
from tests.files import edit
from tests.files.refusing import refuse

KEY = "base_model.model.layers.0.q_proj.lora_A.weight"
NEXT = "base_model.model.layers.0.q_proj.lora_B.weight"


def both_refuse(directory: Path, *words: str) -> None:
    """Check that the library's own reader does not take the file either."""
    refuse(directory, *words)
    with pytest.raises(SafetensorError):  # noqa: SIM117
        with safe_open(directory / edit.WEIGHTS, "pt") as file:
            file.keys()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1, -9])
def test_a_truncated_file(pefts: Path, size: int):
    content = (pefts / edit.WEIGHTS).read_bytes()
    (pefts / edit.WEIGHTS).write_bytes(content[:size])
    both_refuse(pefts, "truncated")


@pytest.mark.parametrize("ours", [True, False])
def test_a_file_truncated_anywhere(tmp_path: Path, ours: bool):
    tiny.saved(tmp_path)
    if not ours:
        edit.as_pefts(tmp_path)
    content = (tmp_path / edit.WEIGHTS).read_bytes()
    for size in range(0, len(content), 37):
        (tmp_path / edit.WEIGHTS).write_bytes(content[:size])
        refuse(tmp_path, "truncated")


def test_more_data_than_the_header_knows(pefts: Path):
    with open(pefts / edit.WEIGHTS, "ab") as file:
        file.write(b"\0")
    both_refuse(pefts, "truncated or too long")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 0, 1, 20])
def test_a_wrong_length(pefts: Path, length: int):
    content = (pefts / edit.WEIGHTS).read_bytes()
    (pefts / edit.WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
    both_refuse(pefts, "adapter_model.safetensors")


def test_a_header_larger_than_any_adapter_needs(pefts: Path):
    header, data = edit.read_header(pefts)
    edit.write_header(pefts, {**header, "__metadata__": {"x": "y" * 33_000_000}}, data)
    refuse(pefts, "more than any adapter needs")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"1", b"[" * 50_000, b'{"a":' * 50_000, b"\xff{}", b"{}{}"]
)
def test_a_header_that_is_no_mapping(pefts: Path, text: bytes):
    edit.write_header(pefts, text, b"")
    both_refuse(pefts, "safetensors header")


def test_a_header_in_another_encoding(pefts: Path):
    """Python's json would guess UTF-16; the format says UTF-8, and other readers hold to it."""
    edit.write_header(pefts, "{}".encode("utf-16-le"), b"")
    both_refuse(pefts, "not readable JSON")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dtype", "F99", "has the type 'F99'"),
        ("dtype", None, "has the type None"),
        ("dtype", ["F32"], "has the type ['F32']"),
        ("dtype", "F64", "cannot fill the bytes"),
        ("shape", [2, 2**62], "cannot fill the bytes"),
        ("shape", [2**63, 2], "cannot fill the bytes"),
        ("shape", [10**300], "cannot fill the bytes"),
        ("shape", [-2, -8], "has the shape [-2, -8]"),
        ("shape", [2.0, 8], "has the shape [2.0, 8]"),
        ("shape", [True, 16], "has the shape [True, 16]"),
        ("shape", "28", "has the shape '28'"),
        ("shape", None, "has the shape None"),
        ("shape", 16, "has the shape 16"),
        ("data_offsets", [0], "has the data_offsets [0]"),
        ("data_offsets", [0, 32, 64], "has the data_offsets"),
        ("data_offsets", [64, 0], "has the data_offsets [64, 0]"),
        ("data_offsets", [-64, 0], "has the data_offsets [-64, 0]"),
        ("data_offsets", ["0", "64"], "has the data_offsets"),
        ("data_offsets", None, "has the data_offsets None"),
    ],
)
def test_a_field_of_an_entry(pefts: Path, field: str, value: Any, words: str):
    header, data = edit.read_header(pefts)
    header[KEY][field] = value
    edit.write_header(pefts, header, data)
    both_refuse(pefts, KEY, words)


def test_as_many_dimensions_as_no_tensor_has(pefts: Path):
    header, data = edit.read_header(pefts)
    header[KEY]["shape"] = [1] * 3000 + [2, 8]
    edit.write_header(pefts, header, data)
    refuse(pefts, "has the shape [1, 1,")


def _overlap(header: dict[str, Any]) -> None:
    header[NEXT] = copy.deepcopy(header[KEY])


def _gap(header: dict[str, Any]) -> None:
    begin, end = header[KEY]["data_offsets"]
    header[KEY]["data_offsets"] = [begin + 8, end + 8]


def _exchange(header: dict[str, Any]) -> None:
    header[KEY]["data_offsets"][1] -= 4
    header[KEY]["shape"] = [(header[KEY]["data_offsets"][1] - header[KEY]["data_offsets"][0]) // 4]


def _metadata_number(header: dict[str, Any]) -> None:
    header["__metadata__"] = {"format": 3}


def _metadata_list(header: dict[str, Any]) -> None:
    header["__metadata__"] = ["pt"]


def _no_entry(header: dict[str, Any]) -> None:
    header[KEY] = None


def _half_entry(header: dict[str, Any]) -> None:
    del header[KEY]["dtype"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_overlap, "overlaps"),
        (_gap, "gap"),
        (_exchange, "gap"),
        (_metadata_number, "not a mapping of text"),
        (_metadata_list, "not a mapping of text"),
        (_no_entry, "is not described by"),
        (_half_entry, "is not described by"),
    ],
)
def test_a_lie_about_the_whole(pefts: Path, change: Callable[[Any], None], words: str):
    header, data = edit.read_header(pefts)
    change(header)
    edit.write_header(pefts, header, data)
    both_refuse(pefts, words)


def test_a_name_that_stands_twice(pefts: Path):
    """The second entry is as sound as the first; only the text of the header shows that."""
    content = (pefts / edit.WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text, data = content[8 : 8 + length].rstrip(), content[8 + length :]
    end = len(data)
    entry = f',"{KEY}":{{"dtype":"F32","shape":[2,8],"data_offsets":[{end},{end + 64}]}}}}'
    edit.write_header(pefts, text[:-1] + entry.encode(), data + bytes(64))
    refuse(pefts, f"names '{KEY}' twice")


def test_millions_of_names(pefts: Path):
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = "{" + ",".join(entry % n for n in range(500_000)) + "}"
    edit.write_header(pefts, text.encode(), b"")
    refuse(pefts, "values, more than any adapter needs")


def test_too_many_tensors(pefts: Path):
    """All sound, and none of any use."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    edit.write_header(pefts, {f"x.{n}": entry for n in range(100_001)}, b"")
    refuse(pefts, "holds 100001 tensors")


def test_a_file_that_is_exchanged_while_it_is_read(pefts: Path):
    """A header of one file never goes with the tensors of another."""
    file = TensorFile(pefts / edit.WEIGHTS)
    tiny.saved(pefts, seed=9, r=3)
    with pytest.raises(hf_lora.AdapterFileError, match="was replaced while it was being read"):
        list(file.read([KEY]))


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    ],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_what_we_write_the_library_reads_and_so_do_we(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
):
    tensor = (torch.randn(shape) * 4).to(dtype)
    with open(tmp_path / "x", "wb") as file:
        serialize({"a": tensor, "b": torch.ones(1)}, {"format": "pt"})(file)
    with safe_open(tmp_path / "x", "pt") as file:
        theirs = file.get_tensor("a")
    ours = dict(TensorFile(tmp_path / "x").read(["b", "a"]))["a"]
    for read in (theirs, ours):
        assert read.dtype == dtype
        assert read.shape == shape
        assert read.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
