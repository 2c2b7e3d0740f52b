"""`python -m kimi_jax.train --config F [section.field=value …]`: fine-tunes, or goes on with a run."""

import argparse
from collections.abc import Sequence

from kimi_jax.command import report, run_command
from kimi_jax.memory_settings import allow_jax_memory


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
    several = parser.add_argument_group(
        "several processes",
        "found by themselves under Slurm, Open MPI and Kubernetes; elsewhere give all three to each",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--processes", type=int, metavar="N", help="how many; 1: this one alone")
    several.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="wins over the file"
    )
    options = parser.parse_args(arguments)

    # A large run needs more of a GPU than JAX takes unasked; read when JAX first sees a device.
    allow_jax_memory()
    # Imported after the arguments are read: --help and a typo answer at once.
    from kimi_jax.config_file import load_config
    from kimi_jax.console import make_console
    from kimi_jax.parallel import processes
    from kimi_jax.training.examples import preview
    from kimi_jax.training.loop import run

    config = load_config(options.config, options.overrides)
    console = make_console()
    if options.preview is not None:
        preview(config, options.preview, console)
        return
    given = processes.Settings(options.coordinator, options.processes, options.process)
    processes.start(given)
    with processes.ended_together(report):
        console.quiet = not processes.is_first()
        run(config, console)


if __name__ == "__main__":
    run_command(main)
