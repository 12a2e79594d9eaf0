# SPDX-License-Identifier: Apache-2.0
"""Preference pairs from scores: AI feedback."""
