# SPDX-License-Identifier: Apache-2.0
"""Preference optimization for diffusion models, beside TRL."""
