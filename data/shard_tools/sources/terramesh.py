"""TerraMesh: 9 million places of 264 px at 10 m with Sentinel-2, Sentinel-1, elevation, NDVI and land cover.

    train|val / S2L2A | S2L1C | S1GRD | S1RTC | DEM | NDVI | LULC | S2RGB / SHARD.tar with KEY.zarr.zip

S1GRD is there in the shards from SSL4EO-S12 and S1RTC in those from Major TOM, so every tile lacks one of them. Land cover
is Esri's, renumbered to 0..9. The values are taken as they are, also the offset of 1000 that the set's authors add to older
Sentinel-2 images. Bands at 20 and 60 m come resampled.

Sources: dataset card and reader (`terramesh.py`) of ibm-esa-geospatial/TerraMesh on Hugging Face; Blumenstiel et al., arXiv
2504.11172. Not checked against a genuine file: the reader tells the array names and the axes, the dtypes are the file's.
"""

from collections.abc import Mapping
from pathlib import Path

from mpmae.shard_tools.sources.zarr_sets import ZarrOptions
from mpmae.shard_tools.sources.zarr_tars import ZarrTarSource


class TerraMeshSource(ZarrTarSource):
    """A TerraMesh folder; the options are those of `ZarrOptions`."""

    def __init__(self, path: Path, options: Mapping[str, str]):
        super().__init__(path, ZarrOptions.read("terramesh", options), "a TerraMesh set")
