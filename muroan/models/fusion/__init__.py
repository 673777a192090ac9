"""Fusions: the encoded tokens of all modalities to one fusion embedding, one file each; `base` is the contract."""
