# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 and Wan 2.2: any text-to-video checkpoint whose pipeline class is `WanPipeline`."""

from typing import Any

from trl_sipo.adapters.wan.adapter import WanAdapter
from trl_sipo.adapters.wan.experts_adapter import WanExpertsAdapter

__all__ = ["WanAdapter", "WanExpertsAdapter", "wan_adapter"]


def wan_adapter(pipeline: Any) -> WanAdapter:
    """The adapter of a `WanPipeline`: with one transformer or, where it has a `boundary_ratio`, two experts."""
    has_experts = pipeline.config.get("boundary_ratio") is not None
    return WanExpertsAdapter(pipeline) if has_experts else WanAdapter(pipeline)
