"""Parts of `tools/bench_step.py`."""
