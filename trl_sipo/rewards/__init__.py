# SPDX-License-Identifier: Apache-2.0
"""Rewards: scorers of images and videos against their prompts, behind one small protocol."""
