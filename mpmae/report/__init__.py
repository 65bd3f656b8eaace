"""One self-contained HTML page of a pretraining run: did it learn, its curves, and tiles reconstructed beside the truth.

`data` is what a page is made of: plain numbers and arrays. `pictures` turns arrays into images, `looks` says how a map is
shown, `tiles` arranges them, `numbers` and `charts` read the logs, `page` writes the file. None of them imports torch: what
fills a `ReportData` from a checkpoint are modules of their own, `collect` and `reconstruct`, with `of_mpmae` and
`of_multimae` for what the predictions of each family of models mean.
"""

from mpmae.report.data import ClassGuess, FromInputs, MapTriple, ReportData, RunSummary, TilePicture, VectorPair
from mpmae.report.page import write_report

__all__ = ["ClassGuess", "FromInputs", "MapTriple", "ReportData", "RunSummary", "TilePicture", "VectorPair", "write_report"]
