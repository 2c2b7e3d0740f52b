"""What a run will hold in each device's memory and compute for a token, before anything is loaded."""

from kimi_jax.planning.fits import check_fits, device_memory
from kimi_jax.planning.memory import Item, MemoryPlan, plan

__all__ = ["Item", "MemoryPlan", "check_fits", "device_memory", "plan"]
