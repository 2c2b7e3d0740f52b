"""Readers of files: what is read where, in how many shares, and what becomes of errors."""

import os
import threading

import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.weights.reader import open_files
from kimi_jax.weights.reading import Readers, Span, host_buffers, shares

CONTENT = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT.tobytes())
    return path


def spans_of(file, ranges):
    return [Span(file, begin, (np.zeros(end - begin, np.uint8),)) for begin, end in ranges]


def assert_filled(spans, ranges):
    for span, (begin, end) in zip(spans, ranges, strict=True):
        assert (np.concatenate(span.into) == CONTENT[begin:end]).all()


# Neighbours, gaps, one that is cut, and one of a few bytes behind it.
RANGES = [(0, 100), (100, 300), (500, 3_000), (3_000, 3_008), (4_000, 4_001), (9_000, 10_000)]


@pytest.mark.parametrize("nbytes", [1, 150, 1_000, 1 << 20])
def test_shares_read_what_the_spans_say(file, nbytes):
    spans = spans_of(file, RANGES)
    divided = shares(spans, nbytes)
    sizes = [sum(array.nbytes for span in share for array in span.into) for share in divided]
    assert max(sizes) <= max(1, 1.5 * nbytes)
    assert sum(sizes) == sum(end - begin for begin, end in RANGES)
    with open_files([file]) as files, Readers(files, 3) as readers:
        readers.start(7, divided)
        found = []
        while not found:
            found = readers.finished()
        assert found == [7]
    assert_filled(spans, RANGES)


def test_neighbours_in_a_file_are_read_at_once(file):
    (share,) = shares(spans_of(file, [(0, 100), (100, 300), (500, 600)]), 1_000)
    assert [(span.offset, [array.nbytes for array in span.into]) for span in share] == [
        (0, [100, 200]),
        (500, [100]),
    ]


def test_a_system_that_reads_less_than_was_asked(file, monkeypatch):
    """It may, on network file systems and with signals; what is missing is asked for again."""
    real, asked = os.preadv, []

    def some(descriptor, into, offset):
        views = [memoryview(array) for array in into]
        asked.append(sum(view.nbytes for view in views))
        if asked[-1] > 70:
            views = [views[0][:70]] if views[0].nbytes > 70 else views[:1]
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", some)
    spans = spans_of(file, RANGES)
    with open_files([file]) as files:
        for share in shares(spans, 1_000):
            for path, offset, into in share:
                files.read(path, offset, into)
    assert len(asked) > 3_809 / 70
    assert_filled(spans, RANGES)


def test_tags_are_told_apart_and_may_be_used_again(file):
    with open_files([file]) as files, Readers(files, 4) as readers:
        for _ in range(5):
            spans = {tag: spans_of(file, RANGES) for tag in range(6)}
            for tag, each in spans.items():
                readers.start(tag, shares(each, 200))
            found = []
            while len(found) < 6:
                found += readers.finished()
            assert sorted(found) == list(range(6))
            for each in spans.values():
                assert_filled(each, RANGES)


def test_waiting_ends_after_its_time(file):
    with open_files([file]) as files, Readers(files, 1) as readers:
        assert readers.finished(0.01) == []


def test_an_error_reaches_who_waits_and_no_thread_stays(file):
    before = threading.active_count()
    spans = spans_of(file, [(n, n + 10) for n in range(0, 9_000, 10)])
    beyond = Span(file, CONTENT.size - 5, (np.zeros(10, np.uint8),))

    def run():
        with open_files([file]) as files, Readers(files, 2) as readers:
            readers.start(0, shares([beyond], 100))
            readers.start(1, shares(spans, 1))
            while True:
                readers.finished()

    with pytest.raises(UserError, match="has become shorter while it was being read"):
        run()
    assert threading.active_count() == before


def test_buffers_are_whole_pages_apart_from_each_other():
    with host_buffers(3, 5_000) as buffers:
        assert [buffer.nbytes for buffer in buffers] == [8_192] * 3
        starts = sorted(buffer.ctypes.data for buffer in buffers)
        assert all(start % 4_096 == 0 for start in starts)
        assert np.diff(starts).tolist() == [8_192, 8_192]
