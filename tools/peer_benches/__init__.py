"""What `tools/bench_peers.py` measures, one module for each peer, and what they share."""
