"""The call shapes that real gpt-oss models make, so that tests and benchmarks time and check the same things."""

from typing import NamedTuple


class ModelShape(NamedTuple):
    """One model's sizes, in the letters of `gptoss_jax`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    experts: int
    experts_per_token: int
    expert_hidden: int
    vocabulary: int
    window: int


GPT_OSS_20B = ModelShape(24, 2880, 64, 8, 64, 32, 4, 2880, 201_088, 128)
GPT_OSS_120B = ModelShape(36, 2880, 64, 8, 64, 128, 4, 2880, 201_088, 128)
MODELS = {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B}
