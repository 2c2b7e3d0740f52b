"""Measures an import against reading the same files raw, cold and warm, and the host memory it takes.

    python tools/bench_load.py --gib 30 --directory DIR [--expert N] [--settings S] [--json FILE]

Also, what the way to the devices can carry: memory that GPUs read by themselves, copied to each of them
by four threads. An import cannot be faster than the slower of the two.

Makes the checkpoint if the directory has none (see synthetic_checkpoint.py). Raw: threads read the
files in order, in blocks, into buffers that they use again; with small blocks all buffers fit the
processor's cache, with large ones they do not. Cold: the files' pages are dropped from the page cache
before. Warm also:

- the parts of an import: only reading, sending too, everything;
- the files in blocks, read and sent to one device as an import does it, and not placed;
- where the thread that sends spends its time in an import;
- raw reading while other memory is sent to the devices, for an import does both at once.

`--settings` are the import's (readers, buffers, MiB of a piece, MiB of a thread's share, pieces of a
program) in place of its own: `--settings 16,6,32,4,4`; `--try` imports once more, warm, with each of
others. GB are 10⁹ bytes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import ONE_DEVICE, Ranks
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.reader import INDEX
from tools.load_bench.imports import timed_import
from tools.load_bench.measuring import PAGES, measure, use
from tools.synthetic_checkpoint import sized_config, write_checkpoint


def main() -> None:
    """Reads the command line, makes the checkpoint if there is none, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=30.0, help="of a checkpoint that is made")
    parser.add_argument("--directory", type=Path, required=True, help="made, or used again")
    parser.add_argument("--expert", type=int, default=1, help="devices that share the experts")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=PAGES)
    parser.add_argument("--settings", help="of the import, in place of its own")
    parser.add_argument("--try", nargs="*", default=[], dest="others", help="other settings")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    if not (options.directory / INDEX).is_file():
        began = time.perf_counter()
        total = write_checkpoint(options.directory, sized_config(options.gib))
        seconds = time.perf_counter() - began
        print(f"wrote {total / 1e9:.2f} GB in {seconds:.1f} s", flush=True)
    if options.settings is not None:
        use(options.settings)
    n = options.expert
    ranks = ONE_DEVICE if n == 1 else Ranks(n, 1, make_mesh(n))
    result: dict[str, Any] = {}

    def say(line: str) -> None:
        print(line, flush=True)

    measure(options.directory, ranks, say, result, options.pages, reasons=True)
    say(json.dumps({k: v for k, v in result.items() if k not in (*PAGES, "reasons")}))
    result["others"] = []
    for text in options.others:
        use(text)
        checkpoint = open_checkpoint(options.directory)
        seconds = [timed_import(checkpoint, ranks) for _ in range(3)][1:]  # the first compiles
        rates = [round(result["gb"] / second, 2) for second in seconds]
        result["others"].append({"settings": text, "import_gb_s": rates})
        say(f"{text}: {rates}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
