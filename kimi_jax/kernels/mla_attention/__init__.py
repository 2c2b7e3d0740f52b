"""Causal attention within segments, with values narrower than keys (multi-head latent attention)."""
