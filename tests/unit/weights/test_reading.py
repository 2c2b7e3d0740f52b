"""Readers of files: what is read where, in how many shares, and what becomes of errors."""

import os
import threading

import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.weights import reading
from kimi_jax.weights.reader import Files, open_files
from kimi_jax.weights.reading import Readers, Span, cores, host_buffers, shares

CONTENT = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(CONTENT.tobytes())
    return path


class Wanted:
    """Ranges of a file, in a memory one after the other."""

    def __init__(self, file, ranges):
        self.ranges, self.spans, end = ranges, [], 0
        for begin, stop in ranges:
            self.spans.append(Span(file, begin, ((end, end + stop - begin),)))
            end += stop - begin
        self.memory = np.zeros(end, np.uint8)

    def read(self, files, share):
        for path, offset, ranges in share:
            files.read(path, offset, [memoryview(self.memory)[a:b] for a, b in ranges])

    def assert_filled(self, content=CONTENT):
        expected = np.concatenate([content[begin:end] for begin, end in self.ranges])
        assert (self.memory == expected).all()


# Neighbours, gaps, one that is cut, and one of a few bytes behind it.
RANGES = [(0, 100), (100, 300), (500, 3_000), (3_000, 3_008), (4_000, 4_001), (9_000, 10_000)]


@pytest.mark.parametrize("nbytes", [1, 150, 1_000, 1 << 20])
def test_shares_read_what_the_spans_say(file, nbytes):
    wanted = Wanted(file, RANGES)
    divided = shares(wanted.spans, nbytes)
    sizes = [sum(end - begin for span in share for begin, end in span.into) for share in divided]
    assert max(sizes) <= max(1, 1.5 * nbytes)
    assert sum(sizes) == wanted.memory.nbytes
    with open_files([file]) as files, Readers(files, 3) as readers:
        readers.start(7, wanted.memory, divided)
        assert readers.finished() == [7]
    wanted.assert_filled()


def test_neighbours_in_a_file_are_read_at_once(file):
    (share,) = shares(Wanted(file, [(0, 100), (100, 300), (500, 600)]).spans, 1_000)
    assert [(span.offset, span.into) for span in share] == [
        (0, ((0, 100), (100, 300))),
        (500, ((300, 400),)),
    ]


def test_a_system_that_reads_less_than_was_asked(file, monkeypatch):
    """It may, on network file systems and with signals; what is missing is asked for again."""
    real, asked = os.preadv, []

    def some(descriptor, into, offset):
        views = [memoryview(array) for array in into]
        asked.append(sum(view.nbytes for view in views))
        left, allowed = 70, []  # often in the midst of the second array or a later one
        for view in views:
            allowed.append(view[:left])
            left -= allowed[-1].nbytes
        return real(descriptor, [view for view in allowed if view.nbytes], offset)

    monkeypatch.setattr(os, "preadv", some)
    wanted = Wanted(file, [*RANGES, *[(n, n + 30) for n in range(8_000, 9_000, 30)]])
    with open_files([file]) as files:
        for share in shares(wanted.spans, 1_000):
            wanted.read(files, share)
    assert len(asked) > 3_809 / 70
    wanted.assert_filled()


def test_more_ranges_than_one_system_call_takes(file):
    wanted = Wanted(file, [(n, n + 2) for n in range(0, 6_000, 2)])
    (share,) = shares(wanted.spans, 1 << 20)
    assert len(share) == 1
    with open_files([file]) as files:
        wanted.read(files, share)
    wanted.assert_filled()


def test_where_one_file_ends_another_does_not_go_on(file, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(CONTENT[::-1].tobytes())
    first, second = Wanted(file, [(0, 100)]), Wanted(other, [(100, 200)])
    (share,) = shares([*first.spans, *second.spans], 1_000)
    assert len(share) == 2
    with open_files([file, other]) as files:
        first.read(files, share[:1])
        second.read(files, share[1:])
    first.assert_filled()
    second.assert_filled(CONTENT[::-1])


def test_tags_are_told_apart_and_may_be_used_again(file):
    with open_files([file]) as files, Readers(files, 4) as readers:
        for _ in range(5):
            wanted = {tag: Wanted(file, RANGES) for tag in range(6)}
            for tag, each in wanted.items():
                readers.start(tag, each.memory, shares(each.spans, 200))
            found = []
            while len(found) < 6:
                found += readers.finished()
            assert sorted(found) == list(range(6))
            for each in wanted.values():
                each.assert_filled()


def test_a_tag_is_finished_when_all_its_shares_are_read(file, monkeypatch):
    real, go_on = Files.read, threading.Event()

    def slow(self, path, offset, into):
        if offset == RANGES[-1][0]:
            go_on.wait(10)
        real(self, path, offset, into)

    monkeypatch.setattr(Files, "read", slow)
    wanted = Wanted(file, RANGES)
    with open_files([file]) as files, Readers(files, 4) as readers:
        readers.start(3, wanted.memory, shares(wanted.spans, 100))
        assert readers.finished(0.2) == []
        go_on.set()
        assert readers.finished() == [3]
    wanted.assert_filled()


def test_waiting_ends_after_its_time(file):
    with open_files([file]) as files, Readers(files, 1) as readers:
        assert readers.finished(0.01) == []


def test_an_error_reaches_who_waits_and_no_thread_stays(file):
    made = []
    many = Wanted(file, [(n, n + 10) for n in range(0, 9_000, 10)])
    beyond = Wanted(file, [(CONTENT.size - 5, CONTENT.size + 5)])

    def run():
        with open_files([file]) as files, Readers(files, 2) as readers:
            made.append(readers)
            readers.start(0, beyond.memory, shares(beyond.spans, 100))
            readers.start(1, many.memory, shares(many.spans, 1))
            while True:
                readers.finished()

    with pytest.raises(UserError, match="has become shorter while it was being read"):
        run()
    assert not any(thread.is_alive() for thread in made[0]._threads)


def test_the_readers_end_only_when_nothing_is_read_any_more(file, monkeypatch):
    """What they read into may be gone afterwards."""
    real, begun, go_on = Files.read, threading.Event(), threading.Event()

    def slow(self, path, offset, into):
        begun.set()
        go_on.wait(10)
        real(self, path, offset, into)

    monkeypatch.setattr(Files, "read", slow)
    wanted = Wanted(file, RANGES[:1])
    with open_files([file]) as files:
        with Readers(files, 2) as readers:
            readers.start(0, wanted.memory, shares(wanted.spans, 1_000))
            begun.wait(10)
            threading.Timer(0.05, go_on.set).start()
        assert not any(thread.is_alive() for thread in readers._threads)
    wanted.assert_filled()


def test_threads_that_the_system_refuses(file, monkeypatch):
    real, started = threading.Thread.start, []

    def start(self):
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(self)
        real(self)

    with open_files([file]) as files:
        readers = Readers(files, 5)
        monkeypatch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"), readers:
            pass
    assert len(started) == 3
    assert not any(thread.is_alive() for thread in started)


def test_a_file_that_is_gone(tmp_path):
    with (
        pytest.raises(UserError, match="gone: cannot be opened: No such file"),
        open_files([tmp_path / "gone"]),
    ):
        pass


def test_buffers_are_whole_pages_apart_from_each_other():
    with host_buffers(3, 5_000) as buffers:
        assert [buffer.nbytes for buffer in buffers] == [8_192] * 3
        starts = sorted(buffer.ctypes.data for buffer in buffers)
        assert all(start % 4_096 == 0 for start in starts)
        assert np.diff(starts).tolist() == [8_192, 8_192]


def test_cores_that_the_process_may_not_use_do_not_count(monkeypatch):
    monkeypatch.setattr(reading.os, "sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(reading.os, "sched_getaffinity")
    monkeypatch.setattr(reading.os, "cpu_count", lambda: 11)
    assert cores() == 11
