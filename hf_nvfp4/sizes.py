"""Named Llamas, and a Mixtral and a Qwen3-MoE of like width, to train from scratch and to time. Pure data."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """A Llama's shape, or that of one with experts, and the tokens of one forward pass.

    Head dimension 64 (tiny) or 128. All features are multiples of 64, so that every linear can be NVFP4.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    tied: bool  # output head and embedding are one matrix
    vocabulary: int
    sequence_length: int
    batch: int  # sequences a device and a forward pass
    key_value_heads: int | None = field(default=None, kw_only=True)  # None: as many as heads
    architecture: str = field(default="llama", kw_only=True)  # or "mixtral", "qwen3_moe"
    experts: int = field(default=0, kw_only=True)  # each with `intermediate`; their loads are not balanced by a loss
    experts_per_token: int = field(default=0, kw_only=True)

    def config(self, vocabulary: int, sequence_length: int, special_tokens: dict):
        """A config of its architecture. vocabulary: the tokenizer's, here rounded up to a multiple of 64.

        special_tokens: bos_token_id, eos_token_id, pad_token_id of the tokenizer.
        """
        from transformers import AutoConfig

        own = {}
        if self.experts:
            count = "num_local_experts" if self.architecture == "mixtral" else "num_experts"
            own = {count: self.experts, "num_experts_per_tok": self.experts_per_token}
        if self.architecture == "qwen3_moe":
            own |= {"moe_intermediate_size": self.intermediate, "head_dim": self.hidden // self.heads}
            own |= {"norm_topk_prob": True}
        return AutoConfig.for_model(
            self.architecture,
            vocab_size=-(-vocabulary // 64) * 64,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=sequence_length,  # what it was trained for, and lm-eval's windows
            use_cache=True,
            **own,
            **special_tokens,
        )


@dataclass(frozen=True)
class Size(Shape):
    """A Shape with training defaults for about 20 tokens a parameter (tiny: for a minute or two)."""

    accumulation: int  # forward passes a step
    steps: int
    learning_rate: float
    warmup: float = 0.1  # fraction of the steps
    validation_tokens: int = 1_000_000  # at most

    def training_defaults(self) -> dict:
        """Flag -> value."""
        return {
            "vocabulary_size": self.vocabulary,
            "sequence_length": self.sequence_length,
            "per_device_train_batch_size": self.batch,
            "per_device_eval_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": self.steps,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup,
            "max_validation_tokens": self.validation_tokens,
        }


# Without the embeddings: 2.1M, 30M, 57M, 128M, 357M, 1.03B parameters.
#              layers hidden inter. heads tied  vocab. seq. batch acc. steps    lr
SIZES = {
    "tiny": Size(4,   192,   640,   3, True,   4096,  256,   4,   1,   400, 3e-3, 0.3, 40_000),
    "30m":  Size(6,   640,  1792,   5, True,  16384,  512,  64,   1, 18000, 1.2e-3),
    # With experts, as many parameters at work for a token as 30m; 92M and 175M without the embeddings.
    "moe-mixtral": Size(6, 640,  896,   5, True,  16384,  512,  64,   1, 18000, 1.2e-3,
                        architecture="mixtral", experts=8, experts_per_token=2),
    "moe-qwen3":   Size(6, 640,  448,   5, True,  16384,  512,  64,   1, 18000, 1.2e-3,
                        architecture="qwen3_moe", experts=32, experts_per_token=4),
    "60m":  Size(8,   768,  2048,   6, True,  16384,  512,  64,   2, 17000, 1e-3),
    "125m": Size(10, 1024,  2816,   8, True,  32768, 1024,  32,   8, 10000, 8e-4),
    "350m": Size(18, 1280,  3456,  10, False, 32768, 2048,   8,  32, 14000, 6e-4),
    "1b":   Size(20, 2048,  5632,  16, False, 32768, 2048,   4, 128, 20000, 4e-4),
}  # fmt: skip

# To time a training step at the widths of larger models; 0.94B, and 7.2B parameters with a vocabulary cut to 32,768, of
# which a GPU holds a few layers.
TIMED = {
    "0.9b": Shape(12, 2048, 8192, 16, False, 32768, 2048, 8),
    "8b": Shape(32, 4096, 14336, 32, False, 32768, 4096, 4, key_value_heads=8),
}
