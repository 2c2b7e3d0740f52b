"""Loss, optimizer, step, loop, checkpoints, metrics."""
