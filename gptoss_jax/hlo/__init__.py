"""Compiled programs as XLA writes them down, read without JAX: instructions, collectives, operations, live buffers."""
