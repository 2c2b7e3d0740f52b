"""Prints where every array of a run lives: `python tools/dump_sharding.py --config F > FILE`.

One line for each array of base and adapters: path, shape, dtype, mesh axis of each dimension, the shape
and the bytes on one device. `tests/golden/sharding` keeps it for Kimi-K2-Thinking on eight devices.
"""

import argparse

from kimi_jax.config_file import load_config
from kimi_jax.planning.arrays import sharding_lines
from kimi_jax.planning.memory import read_architecture, sizing_of


def main() -> None:
    """Reads the command line and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    sizing = sizing_of(config, read_architecture(config))
    print("\n".join(sharding_lines(sizing.table, sizing.adapters, sizing.ranks)))


if __name__ == "__main__":
    main()
