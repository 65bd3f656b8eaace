"""Feature vectors of every tile of a set as GeoParquet, a map of them, and how to read them back."""

from mpmae.lazy import lazy_exports

__all__ = ["TileSource", "Tiles", "embed", "open_source", "read_embeddings"]
_HOME_OF = {
    "TileSource": "mpmae.embed.source",
    "Tiles": "mpmae.embed.source",
    "embed": "mpmae.embed.run",
    "open_source": "mpmae.embed.opening",
    "read_embeddings": "mpmae.embed.folder",
}
__getattr__, __dir__ = lazy_exports(__name__, _HOME_OF)
