"""Unit tests run on the CPU, whatever else the machine has: their tolerances are those of fp32."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
# Tests of kimi_jax.parallel spread work over them; all others use the first.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def quickly():
    """Compiles a function for given arguments without optimisation, three times as fast as with it.

    For equations that are compared within a tolerance; equality of bits is tested under `jax.jit`.
    """

    def compile_for(function, *arguments):
        lowered = jax.jit(function).lower(*arguments)
        return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})

    return compile_for
