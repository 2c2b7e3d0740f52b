"""Ways to spoil a checkpoint directory: each makes a function of the directory."""

import json

from tests.unit.support import INDEX, SHARDS, change_json, change_shard

NORM = "model.norm.weight"  # stands in the last shard


def config(**changes):
    """A change of fields of config.json; None takes a field away."""

    def change(checkpoint):
        def apply(content):
            for key, value in changes.items():
                content[key] = value
                if value is None:
                    del content[key]

        change_json(checkpoint / "config.json", apply)

    return change


def quantization(change):
    def apply(checkpoint):
        change_json(checkpoint / "config.json", lambda raw: change(raw["quantization_config"]))

    return apply


def shard(change):
    return lambda checkpoint: change_shard(checkpoint, change)


def index(change):
    return lambda checkpoint: change_json(checkpoint / INDEX, lambda raw: change(raw["weight_map"]))


def both(change_tensors, change_map):
    """A change of the last shard and of the index that names its tensors."""

    def apply(checkpoint):
        change_shard(checkpoint, change_tensors)
        change_json(checkpoint / INDEX, lambda raw: change_map(raw["weight_map"]))

    return apply


def write(name, content):
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


def remove(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def truncate(checkpoint):
    path = checkpoint / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(checkpoint):
    with (checkpoint / SHARDS[1]).open("ab") as file:
        file.write(b"\0" * 16)


def overlapping_offsets(checkpoint):
    """A header whose first tensor claims more bytes than its shape has."""
    path = checkpoint / SHARDS[1]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[NORM]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
