# SPDX-License-Identifier: Apache-2.0
"""Prompt sets, and the samples that models draw for them: the same seeds for every model, resumable."""
