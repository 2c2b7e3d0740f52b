"""Times of the grouped matmul's implementations on one H200; `choice` picks by them.

From `python tools/bench_kernels.py --only grouped --parts products scratch`; LOG.md, 2026-11-27.
"""

from typing import Literal

# Forward and input gradient together, 48 groups of unequal size, 7168 -> 4096, by rows in an average group.
MILLISECONDS: dict[Literal["pallas", "scratch"], dict[int, float]] = {
    "pallas": {16: 0.91, 341: 3.26, 1365: 11.84},
    "scratch": {16: 5.01, 341: 7.48, 1365: 16.24},
}
