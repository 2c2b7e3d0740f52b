"""Times of the grouped matmul's implementations on one H200; `choice` picks by them.

From `python tools/bench_kernels.py --only grouped --parts products scratch`; LOG.md, 2026-11-22. `scratch`
was timed at one number of rows: its two decodings alone take longer than `pallas` does at fewer, and
its multiplication is slower than that of `pallas` at any number.
"""

from typing import Literal

# Forward and input gradient together, 48 groups, 7168 -> 4096, by rows in an average group.
MILLISECONDS: dict[Literal["pallas", "scratch"], dict[int, float]] = {
    "pallas": {341: 3.34},
    "scratch": {341: 7.52},
}
