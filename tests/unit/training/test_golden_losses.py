"""Ten steps of the demo's configuration give the losses that they gave when the golden was made."""

import importlib.util
from pathlib import Path

from kimi_jax import train

ROOT = Path(__file__).parents[3]
OVERRIDES = ["train.steps=10", "evaluate.loss_every=10", "evaluate.sample_every=null"]
# In nats. On one machine, other instruction sets, compilers' settings and chunks differ by 1e-6.
TOLERANCE = 1e-4


def _tool():
    path = ROOT / "tools" / "compare_losses.py"
    spec = importlib.util.spec_from_file_location("compare_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demos_first_steps(golden_dir, tmp_path, light_compiler):
    """Guards changes of the mathematics, the data or the optimizer that no one meant."""
    config = str(ROOT / "configs" / "demo.yaml")
    train.main(["--config", config, f"run.dir={tmp_path / 'run'}", *OVERRIDES])
    tool = _tool()
    golden = tool.read_losses(golden_dir / "losses" / "demo.jsonl")
    assert [kind for kind, _ in golden] == ["eval"] + ["step"] * 10 + ["eval"]
    found = tool.compare(tool.read_losses(tmp_path / "run"), golden, TOLERANCE)
    assert not found.differing, f"{found.differing}; see tests/golden/losses/README.md"


def test_the_readme_makes_the_golden_with_the_same_settings(golden_dir):
    text = (golden_dir / "losses" / "README.md").read_text(encoding="utf-8")
    assert " ".join(OVERRIDES) in text
