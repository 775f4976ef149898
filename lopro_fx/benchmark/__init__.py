"""Measure a generator: tokens a second, memory, and decoding's share of the machine's memory bandwidth."""

from __future__ import annotations

from lopro_fx.benchmark.bandwidth import read_bandwidth
from lopro_fx.benchmark.memory import peak_rss
from lopro_fx.benchmark.speed import Speed, measure_speed

__all__ = ["Speed", "measure_speed", "peak_rss", "read_bandwidth"]
