"""The checkpoint on disk, in the format that Orbax restores: its manifest, its files, writing, checking, reading.

A checkpoint is a folder that any Orbax reads: one folder per leaf, in it zarr.json and a single data file, whose bytes
are the tensor's own, little-endian and in C order, followed by zarr3's index of the parts in which it can be read.
Beside the leaves lie config.json, generation_config.json, provenance.json and manifest.json. The manifest is compared
with what the model declares before Orbax is asked for anything, because Orbax casts dtypes without a word and
TensorStore takes a missing file for zeros. Nothing in the folder depends on time, host, or number of devices.

Knows no published format: leaves are paths, shapes, dtypes and logical axes. Only `reader` imports JAX.
"""
