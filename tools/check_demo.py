"""Whether a run of configs/demo.yaml learnt the manner: python tools/check_demo.py runs/demo

Prints the score of the sampled answers before the first step and after the last, and ends with 1
unless it rose from under 0.1 to over 0.8.
"""

import argparse
from pathlib import Path

from kimi_jax.training.metrics import read_metrics

BEFORE_AT_MOST, AFTER_AT_LEAST = 0.1, 0.8


def main() -> None:
    """Reads the record of the run and judges it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    lines = read_metrics(parser.parse_args().run)
    samples = [line for line in lines if line["kind"] == "sample"]
    steps = [line for line in lines if line["kind"] == "step"]
    if len(samples) < 2 or not steps:
        raise SystemExit("the run holds no steps with answers before and after")
    before, after = samples[0]["score"], samples[-1]["score"]
    print(
        f"score of the manner: {before:.2f} after step {samples[0]['step']}, "
        f"{after:.2f} after step {samples[-1]['step']}; "
        f"steps took {sum(line['seconds'] for line in steps):.0f} s, the first, with "
        f"compilation, {steps[0]['seconds']:.0f} s"
    )
    if not (before < BEFORE_AT_MOST and after > AFTER_AT_LEAST):
        raise SystemExit(f"required: under {BEFORE_AT_MOST} before and over {AFTER_AT_LEAST} after")


if __name__ == "__main__":
    main()
