"""What one rank's train step reads and writes, instruction by instruction, counted without a GPU.

    python tools/bench_bytes.py --config configs/k2_thinking_8xh200.yaml [--layers 4] [--device H200]
        [--save FILE.hlo] [--least-mb 4] [--rate 4.2] [--json FILE] [section.field=value …]
    python tools/bench_bytes.py --program FILE.hlo [--least-mb 4] [--rate 4.2] [--json FILE]

The first compiles the step of one rank, alone as `tools/bench_step.py` runs it, for an absent GPU (the
CUDA plugin must be installed, a GPU need not be); the second counts a program that was saved. Printed for
the entry and for each loop: its instructions by the time that their bytes take at the rate (TB/s; 4.2 is
a device copy on an H200), kernels apart, and sums. It tells what moves for nothing, not how long a
step takes: products are bound by arithmetic, and kernels are not looked into.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kimi_jax.command import run_command
from kimi_jax.config_file import load_config
from kimi_jax.console import make_console
from kimi_jax.errors import MissingFileError, UserError
from kimi_jax.planning.gpus import DEFAULT
from kimi_jax.planning.memory import read_architecture
from kimi_jax.training.absent import compile_alone
from tools.byte_count.program import read_program
from tools.byte_count.report import report
from tools.byte_count.sections import sections_of, to_json


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/bench_bytes.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="YAML file of the run to compile")
    source.add_argument("--program", type=Path, metavar="FILE", help="a saved program to count")
    parser.add_argument("--layers", type=int, help="instead of the checkpoint's")
    parser.add_argument("--device", metavar="NAME", help=f"to compile for (default: {DEFAULT})")
    parser.add_argument("--save", type=Path, metavar="FILE", help="for the compiled program")
    parser.add_argument("--least-mb", type=float, default=4, help="of an instruction to list")
    parser.add_argument("--rate", type=float, default=4.2, help="TB/s read and written, for times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="for everything counted")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args(arguments)
    if options.program is not None:
        given = ("layers", "device", "save", "overrides")
        if unused := [name for name in given if getattr(options, name)]:
            parser.error(f"--program is counted as it is; leave out: {', '.join(unused)}")
    if options.layers is not None and options.layers < 1:
        parser.error(f"--layers is {options.layers}; required: at least 1")
    if not options.rate > 0:
        parser.error(f"--rate is {options.rate:g}; required: more than 0")
    return options


def compiled_text(options: argparse.Namespace) -> str:
    """The program of one rank alone, kept where the options say."""
    config = load_config(options.config, options.overrides)
    model = read_architecture(config)
    if options.layers is not None:
        model = replace(model, num_hidden_layers=options.layers)
    compiled, text = compile_alone(config, model, options.device or DEFAULT)
    print(
        f"One rank of {config.mesh.expert * config.mesh.data}, {model.num_hidden_layers} layers, for "
        f"{compiled.target}: compiled in {sum(compiled.seconds):.0f} s, {compiled.total / 2**30:.1f} GiB. "
        f"{compiled.implementation}"
    )
    if options.save is not None:
        options.save.write_text(text, encoding="utf-8")
    return text


def saved_text(path: Path) -> str:
    """A program's text.

    Raises:
        UserError: no such file, or bytes that are no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: no such file; --save of this tool writes one") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not text; required: an HLO program's text, as --save of this tool writes it"
        ) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, compiles or reads a program, counts and prints."""
    options = parse(arguments)
    text = compiled_text(options) if options.program is None else saved_text(options.program)
    name = str(options.program or options.config)
    sections = sections_of(read_program(text, name))
    console = make_console()
    for line in report(sections, options.least_mb, options.rate):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if options.json is not None:
        content = {"program": name} | to_json(sections, options.rate)
        options.json.write_text(f"{json.dumps(content, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
