"""Parts of `tools/bench_load.py`."""
