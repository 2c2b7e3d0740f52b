"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): for training, and cached for decoding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kimi_jax.kernels import api as kernels
from kimi_jax.lora import AdapterPlan
from kimi_jax.model.config import ModelConfig
from kimi_jax.model.kept import KEYS_VALUES, LATENT, QUERIES
from kimi_jax.model.layers import Linear, Norm, together
from kimi_jax.model.params import Weight
from kimi_jax.model.rope import rotate
from kimi_jax.parallel.ranks import Ranks


class LatentCache(NamedTuple):
    """What decoding keeps of the past: the compressed keys and values, and the shared rotary key.

    latent: [B, S, C], after its norm. rope_key: [B, S, R], rotated. Place s holds position s. A
    stack of layers has a leading dimension.
    """

    latent: Float[Array, "*layers B S C"]
    rope_key: Float[Array, "*layers B S R"]


class LatentAttention(nnx.Module):
    """Queries, and keys and values expanded from one latent a token; the rotary key is shared by heads."""

    def __init__(
        self,
        rows: dict[str, Weight],
        plan: AdapterPlan,
        config: ModelConfig,
        latent_norm_eps: float,
        ranks: Ranks,
    ) -> None:
        self.config = config
        if config.q_lora_rank is None:
            self.q_proj = Linear(rows["self_attn.q_proj"], plan, ranks)
        else:
            self.q_a_proj = Linear(rows["self_attn.q_a_proj"], plan, ranks)
            self.q_a_layernorm = Norm(rows["self_attn.q_a_layernorm"], latent_norm_eps)
            self.q_b_proj = Linear(rows["self_attn.q_b_proj"], plan, ranks)
        self.kv_a_proj_with_mqa = Linear(rows["self_attn.kv_a_proj_with_mqa"], plan, ranks)
        self.kv_a_layernorm = Norm(rows["self_attn.kv_a_layernorm"], latent_norm_eps)
        self.kv_b_proj = Linear(rows["self_attn.kv_b_proj"], plan, ranks)
        self.o_proj = Linear(rows["self_attn.o_proj"], plan, ranks)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Causal attention within segments, keys and values expanded for every head."""
        config = self.config
        q_in, joint = self._entry(x_BTD)
        q_BTNH = checkpoint_name(self._whole_queries(q_in, positions_BT), QUERIES)
        latent, rope_key_BTR = self._split_latents(joint, positions_BT)
        kv_BTNH = self.kv_b_proj(latent).reshape(*q_BTNH.shape[:3], -1)
        kv_BTNH = checkpoint_name(kv_BTNH, KEYS_VALUES)
        out_BTNU = kernels.latent_attention(
            q_BTNH, kv_BTNH, rope_key_BTR, segment_ids_BT, config.softmax_scale
        )
        return self.o_proj(out_BTNU.reshape(*x_BTD.shape[:2], -1))

    def decode(
        self, x_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"], cache: LatentCache
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """Attention of new tokens to the cached past and themselves, without expanding the past.

        kv_b_proj is absorbed: its key half into the query, its value half into the output (with the
        adapter's change merged in, or an adapted kv_b_proj would have no effect here).
        """
        config = self.config
        q_in, joint = self._entry(x_BTD)
        q_nope, q_rope = self._split_queries(q_in, positions_BT)
        latent, rope_key = self._split_latents(joint, positions_BT)
        row = jnp.arange(x_BTD.shape[0])[:, None]
        cache = LatentCache(
            cache.latent.at[row, positions_BT].set(latent.astype(cache.latent.dtype)),
            cache.rope_key.at[row, positions_BT].set(rope_key.astype(cache.rope_key.dtype)),
        )
        up = self.kv_b_proj.merged(x_BTD.dtype).reshape(
            config.num_attention_heads, -1, config.kv_lora_rank
        )
        up_key_NHC, up_value_NUC = jnp.split(up, [config.qk_nope_head_dim], axis=1)
        f32 = jnp.float32
        q_latent = jnp.einsum("btnh,nhc->btnc", q_nope, up_key_NHC, preferred_element_type=f32)
        scores = jnp.einsum(
            "btnc,bsc->bnts", q_latent.astype(x_BTD.dtype), cache.latent, preferred_element_type=f32
        ) + jnp.einsum("btnr,bsr->bnts", q_rope, cache.rope_key, preferred_element_type=f32)
        place = jnp.arange(cache.latent.shape[1])
        visible = place[None, None, None, :] <= positions_BT[:, None, :, None]
        probabilities = jax.nn.softmax(
            jnp.where(visible, scores * config.softmax_scale, -jnp.inf), axis=-1
        )
        mixed = jnp.einsum(
            "bnts,bsc->btnc",
            probabilities.astype(x_BTD.dtype),
            cache.latent,
            preferred_element_type=f32,
        )
        out_BTNU = jnp.einsum(
            "btnc,nuc->btnu", mixed.astype(x_BTD.dtype), up_value_NUC, preferred_element_type=f32
        )
        return self.o_proj(out_BTNU.astype(x_BTD.dtype).reshape(*x_BTD.shape[:2], -1)), cache

    def queries(self, x_BTD: Array, positions_BT: Array) -> tuple[Array, Array]:
        """Queries of every head, [B, T, N, H] and the rotated [B, T, N, R]."""
        return self._split_queries(self._entry(x_BTD)[0], positions_BT)

    def latents(self, x_BTD: Array, positions_BT: Array) -> tuple[Array, Array]:
        """The normed latent [B, T, C] and the rotated shared key [B, T, R]."""
        return self._split_latents(self._entry(x_BTD)[1], positions_BT)

    def _entry(self, x_BTD: Array) -> tuple[Array, Array]:
        """What the rows are multiplied by first: queries or their latents, and what keys come from."""
        if self.config.q_lora_rank is None:
            q, joint = together(x_BTD, self.q_proj, self.kv_a_proj_with_mqa)
            return q, checkpoint_name(joint, LATENT)
        q_latent, joint = together(x_BTD, self.q_a_proj, self.kv_a_proj_with_mqa)
        return checkpoint_name(q_latent, LATENT), checkpoint_name(joint, LATENT)

    def _whole_queries(self, q_in: Array, positions_BT: Array) -> Array:
        """Queries of every head, [B, T, N, H + R], of which the last part is rotated."""
        config = self.config
        q = q_in
        if config.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q_in))
        q = q.reshape(*positions_BT.shape, config.num_attention_heads, config.qk_head_dim)
        return rotate(q, positions_BT, config)

    def _split_queries(self, q_in: Array, positions_BT: Array) -> tuple[Array, Array]:
        q = self._whole_queries(q_in, positions_BT)
        q_nope, q_rope = jnp.split(q, [self.config.qk_nope_head_dim], axis=-1)
        return q_nope, q_rope

    def _split_latents(self, joint_BTC: Array, positions_BT: Array) -> tuple[Array, Array]:
        latent, rope_key = jnp.split(joint_BTC, [self.config.kv_lora_rank], axis=-1)
        rotated = rotate(rope_key[:, :, None], positions_BT, self.config)[:, :, 0]
        return self.kv_a_layernorm(latent), rotated
