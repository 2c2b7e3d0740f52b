"""Parts of `tools/bench_bytes.py`."""
