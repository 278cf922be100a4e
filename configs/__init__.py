"""Architectures as config.json spells them, and meshes: files that commands find by `configs/NAME` from any folder."""
