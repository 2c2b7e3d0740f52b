"""One measurement in a process of its own: `python -m tools.peer_benches.child CASE_JSON RESULT_FILE`.

`bench_peers` starts it. Its memory is free again when it ends, and its end, however it comes, ends no
other measurement.
"""

import importlib
import json
import sys
from pathlib import Path

from tools.peer_benches.case import Case

# Modules beside this one, each with a function `measure(case) -> dict`.
MODULES = {
    "ours": "ours",
    "transformers": "transformers_peft",
    "pytorch": "pytorch_int4",
}


def main(arguments: list[str]) -> None:
    """Measures and writes the result."""
    case = Case.from_json(json.loads(arguments[0]))
    module = importlib.import_module(f"tools.peer_benches.{MODULES[case.peer]}")
    result = module.measure(case)
    Path(arguments[1]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
