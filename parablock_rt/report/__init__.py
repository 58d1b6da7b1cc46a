"""The report on one or several runs: a single HTML file that needs no network to be viewed.

`folder.py` reads what a run left, `figures.py` computes, `verdict.py` says it in words, `page.py` puts all of it into
`page.html` with its style and scripts, which draw it in the browser.
"""

from parablock_rt.report.page import render, write

__all__ = ["render", "write"]
