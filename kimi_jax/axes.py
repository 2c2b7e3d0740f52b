"""The axis letters of the project, as data.

Arrays that live for more than a few lines carry their axes as a suffix (`x_BTD`); the same letters
stand in einsums, in jaxtyping annotations and in the table of weights. This is their only legend.
"""

from typing import NamedTuple


class Axis(NamedTuple):
    """One letter: what it counts, and the field of an HF `config.json` that gives its size, if any."""

    meaning: str
    config_field: str | None


AXES: dict[str, Axis] = {
    "B": Axis("sequences", None),
    "T": Axis("query positions", None),
    "S": Axis("key positions", None),
    "D": Axis("hidden", "hidden_size"),
    "N": Axis("attention heads", "num_attention_heads"),
    "H": Axis("head dimension without position (nope)", "qk_nope_head_dim"),
    "R": Axis("head dimension with rotary position (rope)", "qk_rope_head_dim"),
    "U": Axis("value head dimension", "v_head_dim"),
    "Q": Axis("query latent", "q_lora_rank"),
    "C": Axis("key/value latent", "kv_lora_rank"),
    "F": Axis("width of a dense layer", "intermediate_size"),
    "M": Axis("width of a routed expert", "moe_intermediate_size"),
    "E": Axis("routed experts", "n_routed_experts"),
    "e": Axis("routed experts on this rank", None),
    "K": Axis("experts a token", "num_experts_per_tok"),
    "A": Axis("assignments: tokens times experts a token", None),
    "G": Axis("int4 groups along the input dimension", None),
    "V": Axis("vocabulary", "vocab_size"),
    "X": Axis("shared experts", "n_shared_experts"),
    "L": Axis("layers of one stack", "num_hidden_layers"),
    "r": Axis("rank of an adapter", None),
}
