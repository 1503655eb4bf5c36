"""Typed configuration of a run: schema, YAML loading, checks, `explain`. Imports no torch."""

from __future__ import annotations

from posttrain.config.checks import check
from posttrain.config.errors import UserError
from posttrain.config.explaining import explain
from posttrain.config.graph import stage_dependencies, stage_order
from posttrain.config.loading import dump_config, load_config
from posttrain.config.schema import RunConfig

__all__ = ["RunConfig", "UserError", "check", "dump_config", "explain", "load_config", "stage_dependencies", "stage_order"]
