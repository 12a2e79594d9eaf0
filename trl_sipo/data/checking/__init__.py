# SPDX-License-Identifier: Apache-2.0
"""`trl-sipo data check`: every row looked at, counts of what is wrong, and how noisy the labels look.

- `rows`: what is found in one row;
- `judgements`: rows that judge the same pair, or pairs that form triples, found by content hashes;
- `features`: what no preference should hang on, such as brightness;
- `noise`: what agreement says of labels, and what it cannot say;
- `check`: the walk over all rows, and its report.
"""
