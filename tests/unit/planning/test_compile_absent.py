"""The train step compiled for eight H200 that are not there. Needs the CUDA plugin, no GPU.

pytest tests/unit/planning/test_compile_absent.py
"""

from dataclasses import replace
from importlib.util import find_spec

import jax
import pytest

from kimi_jax.errors import UserError
from kimi_jax.model.layout import base_arrays
from kimi_jax.model.params import weight_table
from kimi_jax.parallel.ranks import make_ranks
from kimi_jax.parallel.sharding import local_shape
from kimi_jax.planning.gpus import find_gpu
from kimi_jax.planning.hlo import results
from kimi_jax.planning.memory import plan_sizing, sizing_of
from kimi_jax.training.absent import absent_devices, abstract_step, compile_step

H200 = find_gpu("H200")
plugin = pytest.mark.skipif(
    find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for absent GPUs needs the CUDA plugin",
)
LAYERS = 5


@pytest.mark.skipif(find_spec("jax_plugins") is not None, reason="the CUDA plugin is there")
def test_without_the_plugin():
    with pytest.raises(UserError, match=r"needs JAX's CUDA plugin: pip install 'kimi_jax\[cuda\]'"):
        absent_devices(H200, 1, 8)


@pytest.fixture(scope="module")
def compiled(on_eight, model):
    """A few layers of full width: the report, the program, and the plan."""
    config, fewer = on_eight(), replace(model, num_hidden_layers=LAYERS)
    ranks = make_ranks(config.mesh, absent_devices(H200, 1, 8))
    report, text = compile_step(config, fewer, ranks, H200)
    return report, text, plan_sizing(sizing_of(config, fewer), H200), ranks, fewer


@plugin
def test_the_packed_kernels_are_compiled(compiled):
    assert "Hopper kernels" in compiled[0].implementation
    assert "mosaic_gpu" in compiled[1]


@plugin
def test_no_copy_of_the_stacked_experts(compiled):
    """A scan can make XLA copy a stack, or its transpose, out of the loop: 59 GiB at full size."""
    _, text, _, ranks, model = compiled
    found = results(text)
    for array in base_arrays(weight_table(model), ranks).values():
        if array.weight.role != "routed":
            continue
        shape = local_shape(array.path, array.shape, array.spec, ranks.mesh_shape)
        layers, experts, rows, columns = shape
        same = {shape, (layers, experts, columns, rows), (layers * experts * rows, columns)}
        operations = {name for name, value in found if value.shape in same}
        assert operations <= {"parameter", "get-tuple-element", "bitcast"}, array.path


@plugin
def test_the_plan_is_near(compiled):
    report, _, planned, _, _ = compiled
    assert planned.arguments == pytest.approx(report.arguments, rel=1e-3)
    assert planned.program == pytest.approx(report.total, rel=0.10)


def test_one_device_is_the_one_compiled_for(on_eight, model):
    """Without a mesh no sharding names the device: the step would be compiled for the CPU at hand."""
    config = on_eight("mesh.expert=1")
    ranks, device = make_ranks(config.mesh), jax.devices()[1]
    _, arguments = abstract_step(config, model, ranks, device)
    leaves = jax.tree.leaves(arguments)
    assert leaves
    assert all(leaf.sharding.device_set == {device} for leaf in leaves)
