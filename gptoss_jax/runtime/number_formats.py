"""The number formats that a model can be loaded in, by the names that people give them. Knows no JAX."""

ACTIVATIONS = ("bfloat16", "float32")
"""Of the activations: the names of `gptoss_jax.model.transformer.DTYPE_POLICIES`."""

DENSE_ITEMSIZE = {"bfloat16": 2, "int8": 1}
"""Of the weights of attention and unembedding -> bytes of one weight."""
