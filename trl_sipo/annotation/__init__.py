# SPDX-License-Identifier: Apache-2.0
"""Human studies and labelling: what people are asked to compare, the pages on which they do, and what they answer."""
