"""One self-contained HTML page about a finished run: what it learned, how well, what it makes of pictures and texts; or about a search.

`contents.py` says what a report holds, `page.py` writes it from `sections.py`, `chart.py` and `pieces.py`.
"""

from unimodal.report.contents import (
    Caption,
    Drawing,
    Found,
    Grid,
    Hit,
    Metric,
    Picture,
    Report,
    Score,
    Search,
    Stage,
    Swap,
)
from unimodal.report.page import write_misses, write_report, write_search, write_tables

__all__ = [
    "Caption",
    "Drawing",
    "Found",
    "Grid",
    "Hit",
    "Metric",
    "Picture",
    "Report",
    "Score",
    "Search",
    "Stage",
    "Swap",
    "write_misses",
    "write_report",
    "write_search",
    "write_tables",
]
