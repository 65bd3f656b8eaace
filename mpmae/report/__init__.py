"""One self-contained HTML page of a pretraining run: did it learn, its curves, and tiles reconstructed beside the truth.

`data` is what a page is made of: plain numbers and arrays. `pictures` turns arrays into images, `tiles` arranges them,
`numbers` and `charts` read the logs, `page` writes the file. None of them imports torch: what fills a `ReportData` from a
checkpoint is a module of its own, `mpmae.report.collect`.
"""

from mpmae.report.data import ClassGuess, MapTriple, ReportData, RunSummary, TilePicture, VectorPair
from mpmae.report.page import write_report

__all__ = ["ClassGuess", "MapTriple", "ReportData", "RunSummary", "TilePicture", "VectorPair", "write_report"]
