"""Conversation <-> token ids, in the harmony format. Knows no JAX."""
