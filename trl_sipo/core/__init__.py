# SPDX-License-Identifier: Apache-2.0
"""The mathematics, in pure torch: no files, no configuration objects, no randomness without a generator."""
