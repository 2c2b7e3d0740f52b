"""The `config.json` of each tiny checkpoint: the keys of the releases, small numbers."""

GROUP = 32  # inputs that share one int4 scale

IGNORE_K2 = [
    "lm_head",
    "re:.*self_attn.*",
    "re:.*shared_experts.*",
    "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
]
IGNORE_K25 = [*IGNORE_K2[1:], "re:.*lm_head.*", "re:vision_tower.*", "re:mm_projector.*"]


def quantization_config(ignore):
    """The released `quantization_config`, with its own list of modules left alone."""
    return {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": GROUP,
                    "num_bits": 4,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def text_config(**changes):
    """A text `config.json` with the keys of the releases and tiny sizes."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 120,
        "dtype": "bfloat16",
        "eos_token_id": 122,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 80,
        "kv_lora_rank": 24,
        "max_position_embeddings": 2048,
        "model_type": "kimi_k2",
        "moe_intermediate_size": 32,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "pad_token_id": 127,
        "pretraining_tp": 1,
        "q_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 64.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32,
            "type": "yarn",
        },
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "transformers_version": "4.56.2",
        "use_cache": True,
        "v_head_dim": 12,
        "vocab_size": 128,
    }
    return config | changes


def k2_thinking():
    return text_config(quantization_config=quantization_config(IGNORE_K2))


def k25():
    text = text_config(quantization_config=quantization_config(IGNORE_K25), rope_theta=10000.0)
    text["rope_scaling"] = text["rope_scaling"] | {"beta_fast": 32.0}
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "bos_token_id": text["bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": text["eos_token_id"],
        "ignore_index": -100,
        "media_placeholder_token_id": 119,
        "model_type": "kimi_k25",
        "pad_token_id": text["pad_token_id"],
        "text_config": text,
        "tie_word_embeddings": False,
        "vision_config": {
            "init_pos_emb_height": 4,
            "init_pos_emb_width": 4,
            "merge_kernel_size": [2, 2],
            "mm_hidden_size": 8,
            "mm_projector_type": "patchmerger",
            "patch_size": 2,
            "projector_ln_eps": 1e-05,
            "text_hidden_size": text["hidden_size"],
            "vt_hidden_size": 8,
            "vt_intermediate_size": 16,
            "vt_num_attention_heads": 2,
            "vt_num_hidden_layers": 1,
        },
    }


def moonlight():
    config = text_config(
        model_type="deepseek_v3",
        moe_intermediate_size=24,
        n_routed_experts=6,
        n_shared_experts=2,
        num_attention_heads=2,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        q_lora_rank=None,
        routed_scaling_factor=2.446,
    )
    del config["rope_scaling"]
    return config
