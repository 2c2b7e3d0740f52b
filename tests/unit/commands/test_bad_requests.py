"""Requests to `generate` and `load` that cannot be answered: refused before the base is read."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kimi_jax
from kimi_jax import Trainer, UserError, generate
from kimi_jax.weights import load
from tests.unit.support import change_json


@pytest.fixture(autouse=True)
def _the_base_is_not_read(monkeypatch):
    """A large base takes minutes to read; a typing mistake must not."""

    def fail(*_):
        raise AssertionError("the base was read")

    monkeypatch.setattr(load, "_sent", fail)


@pytest.fixture
def adapter(place):
    """An exported adapter, to change at will."""
    return Trainer(place.settings).export(place.folder / "adapter")


REQUESTS = {
    "neither model nor run": (["--prompt", "Hi"], "give --checkpoint or --run, one of the two"),
    "a run with an adapter": (
        ["--run", "r", "--adapter", "a", "--prompt", "Hi"],
        "--run brings its own adapter; leave --adapter away",
    ),
    "eps of nothing": (
        ["--checkpoint", "{c}", "--latent-norm-eps", "0", "--prompt", "Hi"],
        "latent_norm_eps is 0.0; required: above 0",
    ),
    "a run with an eps": (
        ["--run", "r", "--latent-norm-eps", "1e-5", "--prompt", "Hi"],
        "--run brings its own eps; leave --latent-norm-eps away",
    ),
    "no prompt": (["--checkpoint", "{c}"], "the following arguments are required: --prompt"),
    "temperature": (["--temperature", "-1"], "temperature is -1.0; required: 0 or more"),
    "temperature nan": (["--temperature", "nan"], "temperature is nan; required: 0 or more"),
    "top_p too large": (["--top-p", "1.5"], "top_p is 1.5; required: above 0 and at most 1"),
    "top_p zero": (["--top-p", "0"], "top_p is 0.0; required: above 0 and at most 1"),
    "seed": (["--seed", "-4"], "seed is -4; required: 0 to 2147483647"),
    "no new token": (["--max-new-tokens", "0"], "max_new_tokens is 0; required: at least 1"),
    "too many new tokens": (
        ["--max-new-tokens", "512"],
        "and 512 more are asked for; the model has 512 positions: shorten the prompt or max_new",
    ),
    "prompt too long": (
        ["--prompt", "cat " * 600],
        "the model has 512 positions: shorten the prompt",
    ),
    "dtype": (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    "no such adapter": (["--adapter", "{c}/none"], "none: no such adapter directory"),
    "no adapter": (["--adapter", "{c}"], "adapter_config.json: not found"),
    "half a character": (["--prompt", "\ud800"], "holds half of a surrogate pair"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(place, refused, name):
    arguments, required = REQUESTS[name]
    arguments = [argument.format(c=place.checkpoint) for argument in arguments]
    if "one of the two" not in required and "--run" not in arguments and "--prompt" not in required:
        arguments = ["--checkpoint", place.checkpoint, "--prompt", "Hi", *arguments]
    assert required in refused(generate, *arguments)


def test_an_adapter_that_computes_something_else(place, adapter, refused):
    def change(raw):
        raw.update({"use_dora": True, "bias": "all", "r": 0})

    change_json(adapter / "adapter_config.json", change)
    message = refused(
        generate, "--checkpoint", place.checkpoint, "--adapter", adapter, "--prompt", "Hi"
    )
    for part in ("use_dora is True; required: False", "bias is 'all'", "r is 0; required: an int"):
        assert part in message


def test_an_adapter_of_another_base(place, adapter, refused):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.layers."
    lost = f"{prefix}1.mlp.experts.2.up_proj.lora_A.weight"
    wide = f"{prefix}0.self_attn.o_proj.lora_A.weight"
    del tensors[lost]
    tensors[wide] = np.zeros((2, 40), np.float32)
    tensors[f"{prefix}7.self_attn.o_proj.lora_A.weight"] = np.zeros((2, 24), np.float32)
    save_file(tensors, file)
    message = refused(
        generate, "--checkpoint", place.checkpoint, "--adapter", adapter, "--prompt", "Hi"
    )
    for part in (
        f"{lost}: missing",
        f"{wide}: found shape [2, 40], required [2, 24] (rank 2)",
        f"{prefix}7.self_attn.o_proj.lora_A.weight: adapts nothing that this checkpoint has",
        "Nothing was loaded",
    ):
        assert part in message


def test_load_refuses(place, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(UserError, match="cannot hold a safetensors header"):
        kimi_jax.load(place.checkpoint, adapter=adapter)
    with pytest.raises(UserError, match="no such checkpoint directory"):
        kimi_jax.load(place.folder / "absent")
    with pytest.raises(UserError, match="mesh: found object, required"):
        kimi_jax.load(place.checkpoint, mesh=object())
    with pytest.raises(FileNotFoundError, match="no such configuration file"):
        Trainer(place.folder / "absent.yaml")
    with pytest.raises(ValueError, match=r"lora\.rnk: unknown key; did you mean rank\?"):
        Trainer({**place.settings, "lora": {**place.settings["lora"], "rnk": 2}})
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
