"""Parts of `tools/bench_node.py`."""
