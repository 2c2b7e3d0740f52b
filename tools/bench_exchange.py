"""Can rows travel between this host's GPUs while the experts' kernels compute? Each way in its own process.

    python tools/bench_exchange.py [--devices N] [--tokens 6144] [--only WAY …] [--json FILE]

Each rank gathers `--tokens` rows of every rank, and sums what all ranks have for its rows, by
themselves, and in one program with a product by packed experts that needs none of it. `hidden` is the
share of an exchange's own time that the program with both does not show. A process that fails, or
hangs beyond `--limit`, is reported, and the rest go on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

ROOT = Path(__file__).parents[1]
HIDDEN, OUT = 7168, 4096
EXPERTS, CHOSEN = 48, 8  # of a rank; of a token


@dataclass(frozen=True)
class Way:
    """copies: rows come back by an all-to-all, and are summed on arrival instead of on the way.

    environment, options: of the process, and of the compiler.
    """

    copies: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    xla_flags: str = ""
    options: dict[str, Any] = field(default_factory=dict)


WAYS = {
    "sums": Way(),
    "sums, 8 blocks": Way(environment={"NCCL_MAX_CTAS": "8"}),
    "copies": Way(copies=True),
    # Copies alone can be made by a GPU's copy engines, which hold no multiprocessor.
    "copy engines": Way(
        copies=True,
        environment={"NCCL_CTA_POLICY": "ZERO"},
        xla_flags="--xla_gpu_experimental_enable_nccl_symmetric_buffers=true",
    ),
    "one-sided gather": Way(
        options={"xla_gpu_all_gather_mode": "COLLECTIVES_SYMMETRIC_MEMORY"},
    ),
}


def main() -> None:
    """Runs every way and prints a table."""
    parser = argparse.ArgumentParser(
        description="Exchanges beside computation, on this host's GPUs."
    )
    parser.add_argument("--devices", type=int, help="all that there are")
    parser.add_argument("--tokens", type=int, default=6144, help="of one rank")
    parser.add_argument("--width", type=int, default=HIDDEN, help="of a row; smaller without a GPU")
    parser.add_argument("--only", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--limit", type=float, default=90, help="seconds of one process")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("RESULT " + json.dumps(measure(WAYS[options.child], options)), flush=True)
        os._exit(0)  # taking down a communicator without blocks is reported to hang
    found = {name: run(name, options) for name in options.only}
    for name, result in found.items():
        print(f"\n{name}: {json.dumps(asdict(WAYS[name]))}")
        for key, value in result.items():
            print(f"  {key}: {value}")
        if options.json:
            options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One way, in a process of its own, and whether NCCL said that it used copy engines."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "nccl.log"
        result = run_child(name, options, log)
        said = log.read_text(errors="replace") if log.exists() else ""
    return result | {"NCCL says copy engine": said.count("Copy Engine")}


def run_child(name: str, options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """What the process found, or how it ended."""
    way = WAYS[name]
    command = [sys.executable, __file__, "--child", name, "--tokens", str(options.tokens)]
    command += ["--width", str(options.width)]
    if options.devices:
        command += ["--devices", str(options.devices)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {way.xla_flags}".strip()
    environment = {
        **os.environ,
        "NCCL_NVLS_ENABLE": "0",  # multicast: not here, whatever the machine allows
        "NCCL_DEBUG": "INFO",
        "NCCL_DEBUG_SUBSYS": "COLL,TUNING,INIT",
        "NCCL_DEBUG_FILE": str(log),
        **way.environment,
        **({"XLA_FLAGS": flags} if flags else {}),
    }
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=options.limit, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {options.limit:g} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if lines:
        return json.loads(lines[0][7:])
    said = (done.stderr or done.stdout).splitlines()[-12:]
    return {"failed": done.returncode, "said": said}


def measure(way: Way, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each program on the mesh, and whether the exchanges are right."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from kimi_jax.config import MeshSection
    from kimi_jax.kernels import api as kernels
    from kimi_jax.kernels.hopper import compiler_options
    from kimi_jax.kernels.types import PackedWeight
    from kimi_jax.model.params import scale_shape
    from kimi_jax.parallel.ranks import make_ranks
    from tools.kernel_benches.harness import seconds

    count = options.devices or len(jax.devices())
    ranks = make_ranks(MeshSection(expert=count))
    assert ranks.mesh is not None, "one device has nothing to exchange"
    tokens, rows = options.tokens, options.tokens * CHOSEN
    one = P("expert")

    def put(make: Any, spec: Any = one) -> Any:
        return jax.jit(ranks.run(make, (), spec))()

    def key() -> Any:
        return jax.random.key(jax.lax.axis_index("expert"), impl="rbg")

    width = options.width
    shape = (EXPERTS, width * OUT // HIDDEN, width)
    x = put(lambda: jax.random.normal(key(), (tokens, width), jnp.bfloat16))
    a = put(lambda: jax.random.normal(key(), (rows, width), jnp.bfloat16))
    values = put(lambda: jax.random.randint(key(), shape, -8, 8, jnp.int8).astype(jnp.int4))
    scale = put(lambda: jnp.full(scale_shape(shape), 0.002, jnp.bfloat16))
    sizes = put(lambda: jnp.full((EXPERTS,), rows // EXPERTS, jnp.int32))

    def gathered(x: Any) -> Any:
        return ranks.gather(x).max(axis=1)

    def summed(x: Any) -> Any:
        rows = jnp.tile(x, (count, 1))
        if not way.copies:
            return ranks.scatter_sum(rows)
        parts = jax.lax.all_to_all(rows.reshape(count, -1, width), "expert", 0, 0)
        return parts.astype(jnp.float32).sum(axis=0).astype(x.dtype)

    def product(a: Any, values: Any, scale: Any, sizes: Any) -> Any:
        return kernels.grouped_matmul(a, PackedWeight(values, scale), sizes)

    def compiled(function: Any, operands: Any, out: Any) -> Any:
        specs = tuple(one for _ in operands)
        jitted = jax.jit(
            ranks.run(function, specs, out),
            compiler_options=(compiler_options() or {}) | way.options,
        )
        return jitted.lower(*operands).compile()

    weights = (a, values, scale, sizes)
    programs = {
        "gather": ((x,), gathered, one),
        "sum": ((x,), summed, one),
        "product": (weights, product, one),
        "gather + product": ((x, *weights), lambda x, *w: (gathered(x), product(*w)), (one, one)),
        "sum + product": ((x, *weights), lambda x, *w: (summed(x), product(*w)), (one, one)),
    }
    result: dict[str, Any] = {
        "devices": count, "kind": jax.devices()[0].device_kind, "jax": jax.__version__
    }  # fmt: skip
    times = {}
    # Simulated devices deadlock when several programs with exchanges are under way.
    simulated = jax.devices()[0].platform == "cpu"
    each = jax.block_until_ready if simulated else lambda result: result
    for name, (operands, function, out) in programs.items():
        program = compiled(function, operands, out)
        times[name] = seconds(lambda p=program, o=operands: each(p(*o)))
        result[f"{name}, ms"] = round(times[name] * 1e3, 3)
        if name == "gather":
            wanted = np.tile(np.asarray(x.astype(jnp.float32)).max(axis=1), count)
            result["gather is right"] = bool((np.asarray(program(x), np.float32) == wanted).all())
        if name == "sum":
            whole = np.asarray(x.astype(jnp.float32)).reshape(count, tokens, width)
            wanted = np.tile(whole.sum(axis=0), (count, 1))
            found = np.asarray(program(x).astype(jnp.float32))
            # Every rank sums the same part of every rank's copies: x of all ranks, tiled.
            result["sum's relative error"] = float(
                np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
            )
    moved = tokens * width * 2 * (count - 1)
    for kind in ("gather", "sum"):
        alone, both = times[kind], times[f"{kind} + product"]
        result[f"{kind}, received GB/s"] = round(moved / alone / 1e9)
        hidden = (alone + times["product"] - both) / alone
        result[f"{kind}, hidden"] = f"{hidden:.0%}"
    return result


if __name__ == "__main__":
    main()
