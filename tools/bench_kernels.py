"""Times the kernels on this machine's GPU, in one table.

    python tools/bench_kernels.py [--only grouped attention …] [--rows 16384 65536] [--groups skewed even]

Every figure comes from the same run, the ceilings and PyTorch's too (where PyTorch is installed; its
weights are bf16). Operations are those of the definition, 2 · rows · in · out of a product. `GB/s` counts
the bytes that have to be moved at least; `error` is relative to fp32; `temporaries` is what the
compiler reports beyond arguments and results.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch shares the GPU
sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.kernel_benches.harness import Table, measure_ceilings, print_machine

# Modules of tools/kernel_benches, each with a function `rows(table, options)`.
MODULES = {
    "grouped": "grouped_matmul",
    "attention": "attention",
    "cross_entropy": "cross_entropy",
    "token_movement": "token_movement",
}


def main() -> None:
    """Measures everything that was asked for."""
    parser = argparse.ArgumentParser(description="Times the kernels on this GPU.")
    parser.add_argument("--only", nargs="+", choices=tuple(MODULES), default=list(MODULES))
    grouped = parser.add_argument_group("of the grouped matmul")
    grouped.add_argument("--rows", type=int, nargs="+", default=[16384, 65536])
    grouped.add_argument("--groups", nargs="+", choices=("skewed", "even"), default=["skewed"])
    shapes, parts = (
        ("gate_up", "down"),
        ("few", "products", "scratch", "adapters", "pair", "elementwise"),
    )
    grouped.add_argument("--shapes", nargs="+", choices=shapes, default=list(shapes))
    grouped.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    options = parser.parse_args()
    print_machine()
    table = Table(measure_ceilings())
    for name in options.only:
        importlib.import_module(f"tools.kernel_benches.{MODULES[name]}").rows(table, options)


if __name__ == "__main__":
    main()
