"""`python -m kimi_jax.export --run DIR --format F --out DIR`: adapter or merged HF checkpoint."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kimi_jax.command import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and exports the newest checkpoint of a run."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_jax.export",
        description="Exports what a run trained, from its newest checkpoint.",
    )
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument(
        "--format",
        required=True,
        choices=["peft", "peft-fused", "merged-int4", "merged-bf16"],
        help="peft: an adapter that names every expert; peft-fused: transformers 5's layout of fused "
        "experts; merged-…: a whole checkpoint, routed experts as int4 or bf16",
    )
    parser.add_argument("--out", required=True, help="directory to write; must be absent or empty")
    options = parser.parse_args(arguments)

    from kimi_jax.training.assemble import export_run

    out = export_run(Path(options.run), Path(options.out), options.format)
    print(f"Wrote {options.format} to {out}.")


if __name__ == "__main__":
    run_command(main)
