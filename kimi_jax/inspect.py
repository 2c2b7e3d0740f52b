"""`python -m kimi_jax.inspect --checkpoint DIR [--json]`: a download against what its config implies."""

import argparse
import json
from collections.abc import Sequence

from kimi_jax.command import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, checks and describes the checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_jax.inspect",
        description="Checks names, shapes, dtypes and sizes of a checkpoint's tensors against its "
        "config.json, and reports what it is. Exit code 2 if anything differs.",
    )
    parser.add_argument("--checkpoint", required=True, help="HF directory, or `demo`")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)

    from kimi_jax.console import make_console
    from kimi_jax.weights.checkpoint import resolve_checkpoint
    from kimi_jax.weights.inspection import inspect_checkpoint, refuse_misread
    from kimi_jax.weights.inspection_view import print_inspection

    inspection = inspect_checkpoint(resolve_checkpoint(options.checkpoint))
    if options.json:
        print(json.dumps(inspection.as_json(), ensure_ascii=False, allow_nan=False, indent=1))
    else:
        print_inspection(inspection, make_console())
    refuse_misread(inspection)


if __name__ == "__main__":
    run_command(main)
