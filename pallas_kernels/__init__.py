"""The operations that deserve a kernel, one folder each; imports jax only, so that any project can lift one out."""
