# SPDX-License-Identifier: Apache-2.0
"""What a training run costs before it is run: memory, operations, traffic and disk, counted without weights."""
