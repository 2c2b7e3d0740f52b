"""Programs kept between processes: the same results, a new key for whatever changes the program."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.training import kept
from kimi_jax.training.kept import KeptProgram

TABLE = np.arange(12, dtype=np.float32)


@pytest.fixture
def folder(tmp_path):
    """A directory that JAX is told to keep programs in."""
    name, before = "jax_compilation_cache_dir", jax.config.jax_compilation_cache_dir
    jax.config.update(name, str(tmp_path / "kept"))
    compilation_cache.reset_cache()  # JAX asks for its directory once
    yield tmp_path / "kept"
    jax.config.update(name, before)
    compilation_cache.reset_cache()


def program(table=TABLE, factor=2.0):
    """A step that closes over an array, within a loop, and takes its first argument's memory."""

    def step(state, x):
        def body(carry, _):
            return carry * factor + jnp.asarray(table), None

        y, _ = jax.lax.scan(body, state["y"], length=2)
        return {"y": y + x}, y.sum()

    return KeptProgram(jax.jit(step, donate_argnums=0), "step")


def files(folder):
    return sorted(folder.glob("kimi_jax-step-*.program"))


def run(step):
    state, total = step({"y": jnp.ones(12)}, jnp.float32(3))
    return np.asarray(state["y"]), float(total)


def test_what_was_kept_gives_the_same(folder):
    first = program()
    y, total = run(first)
    assert first.seconds.compile > 0
    assert first.seconds.load == 0
    (file,) = files(folder)
    second = program()
    state = {"y": jnp.ones(12)}
    again, same = second(state, jnp.float32(3))
    assert second.seconds.load > 0
    assert second.seconds.lower == second.seconds.compile == 0
    assert state["y"].is_deleted()
    np.testing.assert_array_equal(y, again["y"])
    assert float(same) == total
    assert files(folder) == [file]
    run(second)  # nothing new is looked up


def test_what_a_loaded_program_gives_is_taken_again(folder):
    """The types of its results are equal to no others: each step would be traced and loaded anew."""
    run(program())
    for step in (program(), program()):
        state = {"y": jnp.ones(12)}
        for _ in range(5):
            state, _ = step(state, jnp.float32(3))
        assert len(step._compiled) == 1
        assert step.seconds.load > 0
        step.compile(state, jnp.float32(3))
        assert step.seconds.load > 0
    assert len(files(folder)) == 1


def test_what_jax_had_kept_is_not_kept_again(folder, monkeypatch):
    """Loaded from JAX's cache and written once more, a program of a CPU loads and then fails."""
    name, before = "jax_persistent_cache_min_compile_time_secs", 1.0
    jax.config.update(name, 0.0)
    try:
        y, _ = run(program())
        (file,) = files(folder)
        file.unlink()
        jax.clear_caches()
        again = program()
        np.testing.assert_array_equal(run(again)[0], y)
        assert again.seconds.compile > 0
        assert files(folder) == []
    finally:
        jax.config.update(name, before)


def test_results_are_part_of_the_key(folder):
    """The same program may return its values in another order of names."""
    pair = KeptProgram(jax.jit(lambda x: (x + 1, x * 2)), "step")
    names = KeptProgram(jax.jit(lambda x: {"a": x + 1, "b": x * 2}), "step")
    assert isinstance(pair(jnp.ones(3)), tuple)
    assert set(names(jnp.ones(3))) == {"a", "b"}
    assert len(files(folder)) == 2


def test_nothing_unfinished_is_left(folder, monkeypatch, caplog):
    def full(self, content):
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        run(program())
    assert "No space left" in caplog.text
    assert [path for path in folder.iterdir() if "kimi_jax" in path.name] == []


def test_whatever_differs_has_a_program_of_its_own(folder, monkeypatch):
    """Constants are not in a program's text; flags, sources and places are not in the program at all."""
    run(program())
    changed = TABLE.copy()
    changed[5] += 1
    assert not np.array_equal(run(program(changed))[0], run(program())[0])
    assert len(files(folder)) == 2
    run(program(factor=3.0))
    assert len(files(folder)) == 3
    monkeypatch.setattr(kept, "_sources", lambda: "others")
    run(program())
    assert len(files(folder)) == 4
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    run(program())
    assert len(files(folder)) == 5
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        run(program())
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert len(files(folder)) == 6
    program().compile(
        {"y": jnp.ones(12)}, jnp.float32(3), options={"xla_embed_ir_in_executable": True}
    )
    assert len(files(folder)) == 7
    other = program()
    other({"y": jnp.ones((2, 12))}, jnp.float32(3))
    other({"y": jnp.ones(12)}, jnp.float32(3))  # back to the shape of before, from its file
    assert other.seconds.load > 0
    assert len(files(folder)) == 8


def test_places_are_part_of_the_key(folder):
    mesh = make_mesh(2)
    step = KeptProgram(jax.jit(lambda x: x * 2), "step")
    for spec in (PartitionSpec("expert"), PartitionSpec()):
        step.compile(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, spec)))
    assert len(files(folder)) == 2
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("expert")))
    assert KeptProgram(step.jitted, "step")(x).sharding == x.sharding
    same = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec(None)))
    np.testing.assert_array_equal(KeptProgram(step.jitted, "step")(same), 2 * same)
    assert len(files(folder)) == 2


def test_a_damaged_file_is_said_and_replaced(folder, caplog):
    y, _ = run(program())
    (file,) = files(folder)
    whole = file.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            again, _ = run(program())
        assert "cannot be loaded" in caplog.text
        caplog.clear()
        np.testing.assert_array_equal(y, again)
        assert len(file.read_bytes()) == len(whole)


def test_without_a_directory_nothing_is_kept(folder):
    jax.config.update("jax_compilation_cache_dir", None)
    step = program()
    run(step)
    assert step.seconds == (0, 0, 0, 0)
    assert not folder.exists()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        run(step)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not folder.exists()


def test_a_directory_that_cannot_be_written_is_said(folder, caplog):
    folder.write_text("a file")
    with caplog.at_level(logging.WARNING):
        run(program())
    assert "was not kept" in caplog.text
