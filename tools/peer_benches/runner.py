"""Runs measurements one after the other, each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from tools.peer_benches.case import Case

ROOT = Path(__file__).parents[2]
CHILD = (sys.executable, "-m", "tools.peer_benches.child")
# JAX may take nearly all of the GPU: nothing else is on it meanwhile. PyTorch's segments may grow, so
# that tens of GiB come and go without fragments.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
LAST_WORDS = 12  # lines of a failed process that are shown


@dataclass(frozen=True)
class Outcome:
    """Of one process: its result, or why there is none, and its seconds from start to end."""

    case: Case
    result: dict[str, Any] | None
    failure: str
    seconds: float


def run_case(case: Case, limit_s: float, child: tuple[str, ...] = CHILD) -> Outcome:
    """Measures one case; a process that fails, or takes longer than `limit_s`, is an outcome too."""
    began = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [*child, json.dumps(case.to_json()), str(place)]
        with log.open("wb") as sink:
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env={**ENVIRONMENT, **os.environ},
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    timeout=limit_s,
                    check=False,
                ).returncode
                ending = f"exit code {code}" if code >= 0 else f"signal {-code}"
            except subprocess.TimeoutExpired:
                code, ending = 1, f"stopped after {limit_s:g} s"
        seconds = perf_counter() - began
        if code == 0 and place.is_file():
            return Outcome(case, json.loads(place.read_text(encoding="utf-8")), "", seconds)
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return Outcome(case, None, "\n".join([ending, *said[-LAST_WORDS:]]), seconds)
