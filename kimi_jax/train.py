"""`python -m kimi_jax.train --config F [section.field=value …]`: fine-tunes, or goes on with a run."""

import argparse
from collections.abc import Sequence

from kimi_jax.command import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and runs, or previews, training."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_jax.train",
        description="Fine-tunes a checkpoint of the Kimi-K2 family with LoRA. If the run directory "
        "holds a checkpoint, the run goes on from it.",
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument(
        "--preview",
        type=int,
        metavar="N",
        help="print N training examples with the weight of each token, and stop",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="wins over the file"
    )
    options = parser.parse_args(arguments)

    # Imported after the arguments are read: --help and a typo answer at once.
    from kimi_jax.config_file import load_config
    from kimi_jax.console import make_console
    from kimi_jax.training.examples import preview
    from kimi_jax.training.loop import run

    config = load_config(options.config, options.overrides)
    console = make_console()
    if options.preview is not None:
        preview(config, options.preview, console)
    else:
        run(config, console)


if __name__ == "__main__":
    run_command(main)
