"""Weights out: one checkpoint into the layouts that other programs load."""

from mpmae.export.config import ExportConfig, MultiMAEExportConfig, load_config
from mpmae.export.export import Exported, export

__all__ = ["ExportConfig", "Exported", "MultiMAEExportConfig", "export", "load_config"]
