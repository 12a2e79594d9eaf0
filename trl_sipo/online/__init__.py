# SPDX-License-Identifier: Apache-2.0
"""Rounds of sampling, scoring and training."""
