# SPDX-License-Identifier: Apache-2.0
"""Preference pairs: formats, loading, checking, paired transforms, datasets and their collator."""
