"""What would be quantised, and what was."""

from __future__ import annotations

from lopro_fx.report.explain import Explanation, explain
from lopro_fx.report.report import Report, report

__all__ = ["Explanation", "Report", "explain", "report"]
