# SPDX-License-Identifier: Apache-2.0
"""Everything about the package is stated in setup.cfg; this file lets older tools find it."""

from setuptools import setup

setup()
