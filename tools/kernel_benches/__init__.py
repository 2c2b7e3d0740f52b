"""What `tools/bench_kernels.py` measures: one module for each kernel, and what they share."""
