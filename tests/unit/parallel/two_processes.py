"""Run as two processes by `test_processes`: what they exchange, one JSON line each at the end."""

import json
import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec

from kimi_jax.errors import UserError
from kimi_jax.parallel import processes
from kimi_jax.parallel.mesh import make_mesh
from kimi_jax.parallel.ranks import Ranks
from kimi_jax.weights.checkpoint import open_checkpoint
from kimi_jax.weights.load import load_base
from kimi_jax.weights.reader import Files


def main(number, address, checkpoint):
    jax.config.update("jax_num_cpu_devices", 4)
    processes.start(processes.Settings(address, 2, number))
    ranks = Ranks(8, 1, make_mesh(8))
    found = {"devices": len(jax.devices()), "first": processes.is_first()}
    processes.wait_for_all("start")

    def refuse():
        raise UserError("the directory is full")

    calls = []
    found["value"] = processes.on_first(lambda: calls.append(0) or [number, "ä"])
    found["calls"] = len(calls)
    try:
        processes.on_first(refuse)
    except UserError as error:
        found["refusal"] = str(error)
    found["largest"] = processes.largest_soon(15 * number)()
    found["on_this_machine"] = processes.on_this_machine()

    rows = np.arange(48).reshape(2, 8, 3)
    placed = ranks.put_batch({"tokens": rows})
    found["rows_here"] = sorted(
        int(row)
        for shard in placed["tokens"].addressable_shards
        for row in np.asarray(shard.data)[0, :, 0]
    )
    whole = processes.to_host({"rows": placed["tokens"], "host": np.ones(2)})
    found["whole"] = bool((whole["rows"] == rows).all())

    asked, read = [], Files.read
    Files.read = lambda self, file, offset, into: (
        asked.extend(array.nbytes for array in into),
        read(self, file, offset, into),
    )[1]
    opened = open_checkpoint(checkpoint)
    base = load_base(opened, ranks=ranks)
    found["read"] = sum(asked)
    found["total"] = sum(opened.entries[name].nbytes for name in opened.tensors)
    found["differ"] = [
        path
        for path, expected in load_base(opened).items()
        if processes.to_host(base[path]).tobytes() != np.asarray(expected).tobytes()
    ]
    scale = base["moe_layers.mlp.experts.down_proj.scale"]
    assert scale.sharding.spec == PartitionSpec(None, "expert", None, None)
    print("found " + json.dumps(found), flush=True)


if __name__ == "__main__":
    from pathlib import Path

    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
