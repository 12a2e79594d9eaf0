# SPDX-License-Identifier: Apache-2.0
"""Pairs that are encoded once: latents in shards of fixed shapes, prompts stored once, an index, and a manifest.

    cache.json            what was encoded, with what and how; after the index, so that a folder with it has one
    index.parquet         one row per pair: its prompt, the shard and the row that hold its latents
    prompts.parquet       the text of every prompt, once
    text/00000.safetensors     embeddings of some prompts, each trimmed to its own length, and their text
    text/null.safetensors      what an unconditional sample is given
    latents/00000.safetensors  `chosen` and `rejected` of some pairs, all of one shape
    bad_rows.jsonl             pairs that could not be read and were left out, if there are any

A file is whole or not there. Which file holds what follows from the data and the settings alone: whoever writes
it, and however often the work is interrupted, its bytes are the same.
"""
