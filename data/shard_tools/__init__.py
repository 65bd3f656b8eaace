"""Shard tools: an MMEarth HDF5 folder in, a shard set out, and what is needed to check, describe and imitate one.

`source` reads the folder, `build` writes the shards, `verify` checks them, `stats` computes band statistics, `inspect`
describes a set and draws it, `synth` makes a synthetic folder; `cli` is the command `mpmae-shards`.
"""
