"""Measures a generator: tokens a second, memory, and how near decoding comes to the memory limit of the machine."""

from __future__ import annotations

from lopro_fx.benchmark.bandwidth import read_bandwidth
from lopro_fx.benchmark.memory import peak_rss
from lopro_fx.benchmark.speed import Speed, measure_speed

__all__ = ["Speed", "measure_speed", "peak_rss", "read_bandwidth"]
