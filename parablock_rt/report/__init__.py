"""The report on one or several runs: a single HTML file that works offline.

`folder.py` reads a run's folder, `figures.py` computes, `verdict.py` puts the result into words, and `page.py` puts all
of it into `page.html` with its style and scripts, which draw it in the browser.
"""

from parablock_rt.report.page import render, write

__all__ = ["render", "write"]
