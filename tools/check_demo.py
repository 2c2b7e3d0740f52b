"""Whether a run of configs/demo.yaml learnt the manner: python tools/check_demo.py runs/demo

Prints the score of the sampled answers before the first step and after the last, and how many of them
are to the letter what the plain and the Yoda rows say; ends with 1 unless the score rose from under
0.1 to over 0.8.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kimi_jax.training.metrics import read_metrics

BEFORE_AT_MOST, AFTER_AT_LEAST = 0.1, 0.8
ROOT = Path(__file__).parent.parent
PLAIN = ROOT / "tools" / "demo_text" / "plain_held_out.jsonl"
YODA = ROOT / "kimi_jax" / "assets" / "yoda" / "held_out.jsonl"


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
    for rows, sample in ((PLAIN, samples[0]), (YODA, samples[-1])):
        exact = count_exact(rows, sample["answers"])
        print(f"after step {sample['step']}: {exact} of {len(sample['answers'])} equal {rows.name}")
    if not (before < BEFORE_AT_MOST and after > AFTER_AT_LEAST):
        raise SystemExit(f"required: under {BEFORE_AT_MOST} before and over {AFTER_AT_LEAST} after")


def count_exact(rows: Path, answers: list[dict[str, Any]]) -> int:
    """How many answers are to the letter what the row of the same prompt says."""
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    said = {row["prompt"]: row["completion"] for row in lines}
    return sum(said.get(answer["prompt"]) == answer["answer"] for answer in answers)


if __name__ == "__main__":
    main()
