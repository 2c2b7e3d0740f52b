"""Safetensors directories that cannot be right are refused before a byte of weights is read."""

import json

import numpy as np
import pytest

from kimi_jax.errors import MissingFileError, UserError
from kimi_jax.weights.reader import fingerprint, read_entries, read_header
from tests.unit import golden
from tests.unit.weights.raw_safetensors import (
    INDEX,
    Raw,
    read_index,
    read_raw,
    write_index,
    write_raw,
    write_with_header,
)

FIRST = "model-00001-of-000003.safetensors"


@pytest.fixture
def directory(copy):
    return copy()


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("name", golden.CHECKPOINTS)
def test_entries_are_the_files_bytes(name):
    """Against a second reading of the same files: offsets, dtypes and shapes of every tensor."""
    directory = golden.checkpoint_directory(name)
    entries = read_entries(directory)
    weight_map = read_index(directory)["weight_map"]
    assert entries.keys() == weight_map.keys()
    for shard in set(weight_map.values()):
        for tensor_name, raw in read_raw(directory / shard).items():
            entry = entries[tensor_name]
            assert (entry.file.name, entry.dtype, entry.shape) == (shard, raw.dtype, raw.shape)
            view = entry.read()
            assert view.shape == raw.shape
            assert view.tobytes() == raw.data
            assert not view.flags.writeable


def test_single_file_needs_no_index(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"a": Raw("F32", (2,), b"\0" * 8)})
    assert read_entries(tmp_path)["a"].read().tolist() == [0.0, 0.0]


def test_empty_and_scalar_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    value = np.float32(3).tobytes()
    write_raw(path, {"empty": Raw("F32", (0, 4), b""), "scalar": Raw("F32", (), value)})
    entries = read_header(path)
    assert entries["empty"].read().shape == (0, 4)
    assert entries["scalar"].read() == 3


def test_neither_index_nor_file(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"found neither model\.safetensors\.index\.json nor"
    ):
        read_entries(tmp_path)


def test_absent_shards_are_all_named(directory):
    for shard in (FIRST, "model-00003-of-000003.safetensors"):
        (directory / shard).unlink()
    with pytest.raises(MissingFileError) as caught:
        read_entries(directory)
    assert "2 of 3 shards are not there" in str(caught.value)
    assert f"\n  - {FIRST}\n" in str(caught.value)


@pytest.mark.parametrize(
    "shard",
    [
        *("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", 3, None, ["a"]),
        *("x" * 300, "\ud800", "a\0b"),
    ],
    ids=ascii,
)
def test_shards_outside_the_directory(directory, shard):
    """An index from elsewhere must not make us read other files."""
    weight_map = read_index(directory)["weight_map"] | {"model.norm.weight": shard}
    write_index(directory, weight_map)
    found = refusal(read_entries, directory)
    assert "shards must be plain file names beside the index" in found
    assert f"\n  - model.norm.weight: {shard!r}" in found


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}', b"\xff"]
)
def test_index_that_is_none(directory, content):
    (directory / INDEX).write_bytes(content)
    found = refusal(read_entries, directory)
    assert f"{INDEX}: not an index with an object weight_map" in found


def test_index_and_shards_disagree(directory):
    """A tensor elsewhere than said, one that nobody holds, and one that nobody names: all listed."""
    weight_map = read_index(directory)["weight_map"]
    moved = next(name for name, shard in weight_map.items() if shard != FIRST)
    true_shard = weight_map[moved]
    unnamed = next(name for name, shard in weight_map.items() if shard == FIRST)
    weight_map |= {moved: FIRST, "ghost": FIRST}
    del weight_map[unnamed]
    write_index(directory, weight_map)
    lines = refusal(read_entries, directory).splitlines()
    assert lines[0].endswith("disagrees with the shards")
    assert set(lines[1:]) == {
        f"  - {moved}: the index places it in {FIRST}, which does not hold it",
        f"  - ghost: the index places it in {FIRST}, which does not hold it",
        f"  - {moved}: stands in {true_shard}, and the index places it in {FIRST}",
        f"  - {unnamed}: stands in {FIRST}, and the index does not name it",
    }


def test_truncated_shards_are_all_named(directory):
    """A download that stopped: the header is there, the end of the data is not."""
    shards = sorted(directory.glob("*.safetensors"))[:2]
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-10])
    found = refusal(read_entries, directory)
    assert found.startswith(f"{directory}: shards that cannot be read\n")
    for shard in shards:
        assert f"\n  - {shard}: the header describes " in found
    assert "truncated: download it again" in found


def header_of(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "the header is not a safetensors header"),
        (b"[1]", b"", "the header is not a safetensors header"),
        (b"\xff\xfe", b"", "the header is not a safetensors header"),
        (b'{"a": 3}', b"", "the header is not a safetensors header"),
        ({"a": {"dtype": "F32"}}, b"", "the header is not a safetensors header: 'data_offsets'"),
        (header_of(dtype="F6_E3M2"), b"\0" * 8, "dtype 'F6_E3M2' is not known"),
        (header_of(dtype="F64"), b"\0" * 8, "offsets 0 to 8 do not fit F64 of shape [2]"),
        (header_of(shape=[3]), b"\0" * 8, "offsets 0 to 8 do not fit F32 of shape [3]"),
        (header_of(shape=[-1, -2]), b"\0" * 8, "[-1, -2] is not a shape"),
        (
            header_of(shape=[2**40, 2**40], data_offsets=[0, 0]),
            b"",
            f"do not fit F32 of shape [{2**40}, {2**40}]",
        ),
        (header_of(shape="2"), b"\0" * 8, "'2' is not a shape"),
        (header_of(shape=None), b"\0" * 8, "None is not a shape"),
        (header_of(data_offsets=[-8, 0]), b"\0" * 8, "offsets -8 to 0 do not fit"),
        (header_of(data_offsets=[8, 0]), b"\0" * 8, "offsets 8 to 0 do not fit"),
        (header_of(data_offsets=[0]), b"\0" * 8, "the header is not a safetensors header"),
        (header_of(), b"\0" * 7, "the file has 76; truncated: download it again"),
        (header_of(), b"\0" * 9, "the file has 78; too long: download it again"),
        (
            header_of() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
            b"\0" * 12,
            "b begins at byte 135 of the file, the tensor before it ends at 139",
        ),
        (header_of(data_offsets=[4, 12]), b"\0" * 12, "the tensor before it ends at"),
    ],
)
def test_bad_headers(tmp_path, header, data, message):
    path = tmp_path / "model.safetensors"
    write_with_header(path, header, data)
    found = refusal(read_header, path)
    assert found.startswith(f"{path}: ")
    assert message in found


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\0",
        b"\xff" * 64,
        (1000).to_bytes(8, "little") + b"{}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ],
)
def test_files_that_are_not_safetensors(tmp_path, content):
    """Among them the pointer that a clone without Git LFS leaves in place of a shard."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert f"{len(content)} bytes, which cannot hold a safetensors header" in refusal(
        read_header, path
    )


def test_fingerprint_tells_bases_apart(copy, tmp_path):
    directory = copy()
    first = fingerprint(directory)
    assert first == fingerprint(golden.checkpoint_directory("k2_thinking"))
    assert first != fingerprint(golden.checkpoint_directory("k25"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
    assert fingerprint(directory) != first
