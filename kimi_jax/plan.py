"""`python -m kimi_jax.plan --config F [section.field=value …]`: memory and work of a run, before it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from kimi_jax.command import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, prints the plan, and, if asked, what the compiler says."""
    parser = argparse.ArgumentParser(
        prog="python -m kimi_jax.plan",
        description="Says what each device of a run will hold, what would fit, and what a token "
        "costs. Of the checkpoint only config.json is read; no device is used.",
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--picture", type=Path, metavar="OUT.png", help="bars of the memory")
    parser.add_argument(
        "--device", default="H200", help="a GPU's name, or its memory like 96GB (default: H200)"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="instead of the mesh's; as many rows on each"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the train step for these devices, which need not be there, and compare. "
        "Needs the CUDA plugin; takes minutes unless JAX_COMPILATION_CACHE_DIR keeps the result",
    )
    parser.add_argument(
        "--topology",
        metavar="MACHINESxGPUS",
        help="with --compile: how the devices stand (default: mesh.data x mesh.expert)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="wins over the file"
    )
    options = parser.parse_args(arguments)

    from kimi_jax.config_file import load_config
    from kimi_jax.console import make_console
    from kimi_jax.planning.memory import on_devices
    from kimi_jax.planning.report import make_report

    config = load_config(options.config, options.overrides)
    if options.devices is not None:
        config = on_devices(config, options.devices)
    report = make_report(config, options.device)
    if options.picture is not None:
        report.save_picture(options.picture)
    if options.compile or options.topology is not None:
        from kimi_jax.training.absent import compile_run

        report = report.beside(compile_run(config, options.device, options.topology))
    report.print(make_console(), as_json=options.json)


if __name__ == "__main__":
    run_command(main)
