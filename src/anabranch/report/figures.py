# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report. Each function takes numbers and their intervals and returns a Figure with its data.

Colours are safe for colour-blind readers (blue above the centre, orange below) and never carry a meaning alone:
numbers, outlines, bold type and words say the same. None and NaN print as an en dash.
"""

from anabranch.report.bars import RateRow, rate_bars
from anabranch.report.boxes import boxed_sheet, heat_strip, strips
from anabranch.report.chains import Asked, Told, chain_figure
from anabranch.report.flow import flow
from anabranch.report.lines import Effect, curves, forest
from anabranch.report.maps import Matrix, loads, matrix, two_matrices
from anabranch.report.sheets import ClusterSheet, cluster_sheets, contact_sheet

__all__ = [
    "Asked",
    "ClusterSheet",
    "Effect",
    "Matrix",
    "RateRow",
    "Told",
    "boxed_sheet",
    "chain_figure",
    "cluster_sheets",
    "contact_sheet",
    "curves",
    "flow",
    "forest",
    "heat_strip",
    "loads",
    "matrix",
    "rate_bars",
    "strips",
    "two_matrices",
]
