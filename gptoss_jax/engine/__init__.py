"""Requests of token ids in, token events out: admission, prefill, decoding, sampling. Knows no text."""
