"""Kernels, each beside a plain reference that says what it computes. `api` is the way in."""
