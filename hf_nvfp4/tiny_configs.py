"""Tiny configs of any Transformers architecture, by rules on the names of a config's fields.

Knows config fields: what is a width, a count of heads, layers, experts. Knows nothing of NVFP4, nor of models.
A tiny config keeps the architecture: every kind of layer once, grouped heads where there are, as many norms and biases.
Sizes that are multiples of 16 at full size stay so, so that layers are kept for what they are, not for being tiny.
"""

import inspect
import re

from transformers import PreTrainedConfig

WIDTH, HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, TOKENS = 64, 4, 16, 128, 256, 32
# Fields of integers by name: the first that matches decides, and no value gets larger than it was. Several names are
# used for different things (num_heads, n_groups); the value here is right for all of them.
_SIZES = [
    # state space models and linear attention: 16 heads of 8 are twice the width
    (r"mamba_(n_heads|num_heads)|num_heads_mamba|linear_num_value_heads", 16),
    (r"mamba_(d_head|head_dim|headdim)|linear_(key|value)_head_dim", 8),
    (r"linear_num_key_heads", 8),
    (r"n_mamba_heads", 2),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)", 16),
    (r"(mamba_|time_step_|mamba_dt_)?(dt_rank|time_step_rank)", 16),
    (r"(mamba_)?n_?groups|o_groups|n_group", 2),
    (r"(mamba_|attention_)?chunk_size", 16),
    # attention
    (r".*head_dim|d_kv|kv_channels|dim_head|attention_head_size", HEAD_DIM),
    (r".*(num_key_value_heads|num_kv_heads|kv_n_heads)", HEADS // 2),
    (r".*(num_|n_)?(attention_|attn_)?heads?|n_head", HEADS),
    (r".*(_lora_rank|_rank)|rank", 16),
    (r".*rotary_dim", HEAD_DIM // 2),
    (r".*(sliding_window(_size)?|local_attention(_window_len)?|attention_window_size|window_size)", TOKENS // 2),
    (r"index_topk", TOKENS // 2),
    # experts
    (r"topk_group", 1),
    (r"num_experts_per_tok|moe_top_?k|moe_k", 2),
    (r".*(num_|n_).*(shared|zero)_?experts?", 1),
    (r"(moe_|num_|n_)*(local_|routed_|total_)?(num_)?experts", 16),
    (r".*(moe|expert|experts)_.*(intermediate|ffn|hidden).*(size|dim)|shared_.*intermediate_size", WIDTH // 2),
    (r"num_kv_shared_layers", 0),
    # depth
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|(attn|expert)_layer_offset", 1),
    (r"(attn|expert)_layer_period|interleave_moe_layer_step|decoder_sparse_step|.*every_n_layers", 2),
    (r".*(num|n)_?(hidden_)?(layers?|blocks)|(encoder|decoder)_layers|n_layer", 2),
    # widths
    (r".*(intermediate|ffn|feed_forward|inner|mlp|dff|dim_ff|_ff).*", INTERMEDIATE),
    (r".*(embedding|embed_proj)_(size|dim)|pronunciation_embed_dim|shape_embed_dim", WIDTH // 2),
    (r".*(hidden_size|d_model|n_embd|emb_dim|width|embed_dim|proj_dim|projection_dim|hidden_dim).*", WIDTH),
    (r".*vocab(ulary)?(_size.*)?|codebook_size|.*num_embeddings", VOCABULARY),
    (r".*(max_.*positions?|position_embeddings|max_seq.*|n_positions|n_ctx|context_length)", 4 * TOKENS),
    (r"image_size", 32),
]


# Fields that say nothing by default, where the model needs a value.
_NEEDED = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS // 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
}
# Config class -> (fields, why no rule does it).
OVERRIDES = {
    "BambaConfig": ({"attn_layer_indices": [1]}, "the default has no attention layer"),
    "GraniteMoeHybridConfig": ({"layer_types": ["mamba", "attention"]}, "the default has no attention layer"),
    "GPTNeoConfig": ({"attention_types": [[["global", "local"], 1]]}, "layers are a list of lists"),
    "Lfm2Config": ({"layer_types": ["conv", "full_attention"]}, "the default has no convolution"),
    "Lfm2MoeConfig": ({"layer_types": ["conv", "full_attention"]}, "the default has no layer types"),
    "RecurrentGemmaConfig": ({"block_types": ["recurrent", "attention"]}, "a cycle of three types"),
    "Dots3NoteTextConfig": ({"num_key_value_heads": HEADS}, "has to be as many as heads"),
    "Inkling2TextConfig": ({"num_key_value_heads": HEADS}, "a convolution has 4 outputs a head: 16"),
    "ZambaConfig": (
        {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_hidden_layers": 3},
        "hybrid layers share their weights: a single one is an error",
    ),
    "Qwen4ExpTextConfig": (
        {
            "indexer_n_heads": HEADS,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": TOKENS // 2,
            "indexer_compress_ratio": 4,
        },
        "the default has no indexer, the model always",
    ),
    "XmodConfig": ({"default_language": "en_XX"}, "the default names no language"),
    "Mamba2Config": ({"num_heads": 16, "head_dim": 8}, "names of attention for heads of the state space"),
    "ReformerConfig": (
        {
            "is_decoder": True,
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [4, TOKENS // 4],
            "axial_pos_embds_dim": [16, WIDTH - 16],
            "local_attn_chunk_length": 8,
            "lsh_attn_chunk_length": 8,
            "num_buckets": 4,
            "hash_seed": 1,
        },
        "positions and chunks have to multiply to the length of the batch; hashes are drawn",
    ),
}


def tiny_config(cls: type[PreTrainedConfig], **overrides) -> PreTrainedConfig:
    """A tiny config of a class, with every kind of layer that its default config has.

    overrides: values of fields for which no rule of names is right, besides those of `OVERRIDES`.

    Raises:
        Exception: whatever the class raises on its own defaults, or on the tiny values.
    """
    fixed, _ = OVERRIDES.get(cls.__name__, ({}, ""))
    return cls(**_values(cls) | fixed | overrides)


def _values(cls: type[PreTrainedConfig]) -> dict:
    """What the rules make of a class: the fields that differ from its defaults."""
    full, common = cls(), inspect.signature(PreTrainedConfig.__init__).parameters
    given = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}
    names = [name for name in given if name not in {*common, "self"} or name.endswith("_token_id")]
    fields = {name: _value(full, name, given[name]) for name in names}
    values = _layers(full, fields)
    for name, value in fields.items():
        if name in values:
            continue
        if isinstance(value, PreTrainedConfig):
            values[name] = tiny_config(type(value))
        elif value is None and name in _NEEDED:
            values[name] = _NEEDED[name]
        elif given[name] is not None and (tiny := _tiny(name, value, full)) != value:
            values[name] = tiny
    return values


def _value(full: PreTrainedConfig, name: str, default=None):
    try:
        return getattr(full, name, default)
    except Exception:  # some configs have values of each layer, and none for all
        return default


def _tiny(name: str, value, full: PreTrainedConfig):
    """A field's tiny value; the value itself where no rule says another."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if re.fullmatch(r".*(dropout|drop|pdrop|jitter|drop_rate).*", name):
        return 0.0
    if isinstance(value, float) or value <= 0:
        return value
    if re.fullmatch(r".*_token_(id|index)|.*_index", name):
        return value if value < VOCABULARY else VOCABULARY - 1 - value % 31
    if re.fullmatch(r".*(num_key_value_heads|num_kv_heads)", name) and value == _value(full, "num_attention_heads"):
        return HEADS
    return next((min(value, tiny) for pattern, tiny in _SIZES if re.fullmatch(pattern, name)), value)


def _layers(full: PreTrainedConfig, fields: dict) -> dict:
    """The number of layers, lists with an entry for each, and lists of their indices: each kind of layer, and two."""
    count = _value(full, "num_hidden_layers")
    lists = {n: list(v) for n, v in fields.items() if isinstance(v, (list, tuple)) and v and count}
    indices = {n: v for n, v in lists.items() if _are_indices(n, v, count)}
    entries = {n: v for n, v in lists.items() if len(v) == count and n not in indices}
    if not entries:
        return {}
    flags = {n: [i in v for i in range(count)] for n, v in indices.items()}
    rows = list(zip(*(map(str, v) for v in (entries | flags).values()), strict=True))
    chosen = sorted({rows.index(row) for row in rows})
    chosen = chosen if len(chosen) > 1 else [0, 1]
    values = {name: [value[i] for i in chosen] for name, value in entries.items()}
    values |= {name: [new for new, i in enumerate(chosen) if i in value] for name, value in indices.items()}
    return values | ({"num_hidden_layers": len(chosen)} if "num_hidden_layers" in fields else {})


def _are_indices(name: str, value: list, count: int) -> bool:
    named = re.fullmatch(r".*(layers|idxs|indices|layer_ids|indexes)", name)
    return bool(named) and all(type(i) is int and i < count for i in value) and value == sorted(set(value))
