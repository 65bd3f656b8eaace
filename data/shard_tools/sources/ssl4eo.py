"""SSL4EO-S12 v1.1: 246,144 places of 264 px at 10 m, each taken in four seasons, by Sentinel-2 and Sentinel-1.

Two layouts are in use, told apart by what the folders hold:

    train|val / S2L2A | S2L1C | S1GRD | S2RGB | DEM | NDVI | LULC / SHARD.tar with KEY.zarr.zip     (WebDataset)
    train|val / S2L2A | S2L1C | S1GRD | S2RGB / NAME.zarr.zip of 64 places                          (zarr chunk files)

A chunk file has bands [S, T, F, H, W], names in `sample`, center_lat and center_lon [S] and times `time_` [S, T]. Seasons
are tiles of their own: ID_t0 to ID_t3. The values are taken as they are: the chunk files have the offset of 1000 of newer
Sentinel-2 products, the tars do not, so there a reflectance of 0 reads as no data.

Sources: README.md, ssl4eos12_dataset.py and zarr_dataset.py of DLR-MF-DAS/SSL4EO-S12-v1.1; Blumenstiel et al., arXiv
2503.00168. Not checked against a genuine file. How many places a chunk spans is not documented; a read takes it whole.

Shapes: S places of a file, T times, F bands of the file, H x W image in pixels.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mpmae.errors import SourceError
from mpmae.shard_tools.source_checks import examples
from mpmae.shard_tools.sources.foreign import UnreadableError
from mpmae.shard_tools.sources.image_source import Cut, Images
from mpmae.shard_tools.sources.layers import Layer, same_size
from mpmae.shard_tools.sources.zarr_sets import (
    Folders,
    Sample,
    ZarrOptions,
    ZarrSource,
    find_folders,
    probe_layer,
    splits_of,
)
from mpmae.shard_tools.sources.zarr_tars import SUFFIX, Tally, ZarrTarSource
from mpmae.shard_tools.sources.zarr_zip import ZarrZip
from mpmae.shard_tools.tile_source import TileSource

WHAT = "an SSL4EO-S12 v1.1 set"
_NUM_OPENS = 4


def open_ssl4eo(path: Path, given: Mapping[str, str]) -> TileSource:
    """The source of an SSL4EO-S12 folder in either layout; the options are those of `ZarrOptions`."""
    options = ZarrOptions.read("ssl4eo", given)
    folders = find_folders(path, options, WHAT)
    if any(any(layers["sentinel2"].glob(f"*{SUFFIX}")) for layers in folders.by_split.values()):
        return ChunkFileSource(path, options, folders)
    return ZarrTarSource(path, options, WHAT)


class ChunkFileSource(ZarrSource):
    """A set of chunk files, joined by file name and place. SourceError with every problem of the files at once."""

    def __init__(self, path: Path, options: ZarrOptions, folders: Folders):
        self._files: list[Path] = []
        notes = self._join(folders, options)
        probes = self._probe(options)
        problem = same_size({name: size_px for name, (_, size_px, _) in probes.items()})
        if problem:
            raise SourceError(f"{path}: {problem}; leave layers out with the option modalities")
        _, size_px, num_times = probes["sentinel2"]
        splits, split_of = splits_of(list(folders.by_split), self._keys, self._split_of, options)
        super().__init__(
            path,
            Images(self._keys, np.array([size_px], np.int64), num_times, splits, split_of),
            {name: layer for name, (layer, _, _) in probes.items()},
            options,
            content=[[str(file.relative_to(path)), file.stat().st_size] for file in self._files],
            has_place=True,
            notes=notes,
        )

    def _join(self, folders: Folders, options: ZarrOptions) -> list[str]:
        """Fills `_keys`, `_split_of` and `_at`, per modality int32 [I, 2]: number of the file (-1: none), place in it."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in folders.modalities}
        keys, split_of, problems = [], [], []
        tally = Tally(options.join)

        def names_of(file: Path) -> np.ndarray | str:
            try:
                with ZarrZip(file) as archive:
                    names = archive.texts("sample")
                    return np.array(names).astype("S") if names else f"{file}: no array sample with the names of its places"
            except UnreadableError as error:
                return f"{file}: {error}; download the file again"

        with ThreadPoolExecutor(_NUM_OPENS) as pool:
            for number, layers in enumerate(folders.by_split.values()):
                for main_file in sorted(layers["sentinel2"].glob(f"*{SUFFIX}")):
                    there = {n: d / main_file.name for n, d in layers.items() if (d / main_file.name).is_file()}
                    samples = dict(zip(there, pool.map(names_of, there.values()), strict=True))
                    broken = [text for text in samples.values() if isinstance(text, str)]
                    if broken:
                        problems += broken
                        continue
                    main = samples["sentinel2"]
                    kept, at = np.ones(len(main), bool), {}
                    for name, theirs in samples.items():
                        order = np.argsort(theirs, kind="stable")
                        place = np.minimum(np.searchsorted(theirs, main, sorter=order), len(theirs) - 1)
                        at[name] = np.where(theirs[order[place]] == main, order[place], -1)
                        tally.add_samples(name, main_file.name, main[at[name] < 0], theirs, main)
                        kept &= (at[name] >= 0) | (options.join == "sentinel2")
                    for name in folders.modalities:
                        if name not in at:
                            tally.add("shards", name, [main_file.name])
                            found[name].append(np.full((kept.sum(), 2), -1, np.int32))
                            continue
                        self._files.append(there[name])
                        file = np.where(at[name] < 0, -1, len(self._files) - 1)
                        found[name].append(np.stack([file, at[name]], axis=1)[kept].astype(np.int32))
                    keys.append(main[kept])
                    split_of.append(np.full(kept.sum(), number))
        if problems:
            raise SourceError(problems)
        self._keys, self._split_of = np.concatenate(keys), np.concatenate(split_of)
        self._at = {name: np.concatenate(parts) for name, parts in found.items()}
        return tally.notes()

    def _probe(self, options: ZarrOptions) -> dict[str, tuple[Layer, tuple[int, int], int]]:
        """Per modality that any kept place has: layer, (H, W) and T of its first file."""
        probes = {}
        for name, at in self._at.items():
            has = np.flatnonzero(at[:, 0] >= 0)
            if not len(has):
                continue
            file = self._files[at[has[0], 0]]
            try:
                with ZarrZip(file) as archive:
                    shape = archive.shape("bands")
                    if len(shape) != 5:
                        raise UnreadableError(f"bands of shape {shape}, expected (places, times, bands, height, width)")
                    layer = probe_layer(str(file), name, archive.texts("band"), shape[2], archive.dtype("bands"), options)
            except UnreadableError as error:
                raise SourceError(f"{file}: {error}; download the file again") from error
            probes[name] = layer, shape[3:], shape[1]
        if "sentinel2" not in probes:
            raise SourceError(f"no place has all of {', '.join(self._at)} ({examples(self._files)}); try join=sentinel2")
        return probes

    def _load(self, name: str, cut: Cut) -> Sample | None:
        file, place = map(int, self._at[name][cut.image])
        if file < 0:
            return None
        with ZarrZip(self._files[file]) as archive:
            moment = 0 if archive.shape("bands")[1] == 1 else cut.moment
            step = archive.chunks("bands")[0]
            first = place // step * step

            def load() -> tuple[np.ndarray, int]:
                values = archive.read("bands", (slice(first, first + step), moment))
                return values, values.nbytes

            values = self._cache.get((name, file, first, moment), load)
            lat, lon = (float(archive.read(key, place)) for key in ("center_lat", "center_lon"))
            times = archive.times_ns("time_", (place, slice(moment, moment + 1))) if "time_" in archive else np.zeros(0)
            return Sample(values[place - first][None], archive.fill("bands"), lat, lon, times)
