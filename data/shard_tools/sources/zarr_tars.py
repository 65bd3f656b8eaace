"""Sets of WebDataset tars of zarr zips, one series of tars per layer: SPLIT/LAYER/SHARD.tar with KEY.zarr.zip members.

The tars of a shard have one name in all layers, and the samples of a place one key; they are joined by both. Tars are
indexed by their headers when the set is opened (`tar_index`); a tile is one read per layer.

Shapes: I images (places), M members of a tar.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpmae.errors import SourceError
from mpmae.shard_tools.source_checks import NUM_EXAMPLES, examples
from mpmae.shard_tools.sources.foreign import UnreadableError
from mpmae.shard_tools.sources.image_source import Cut, Images
from mpmae.shard_tools.sources.layers import same_size
from mpmae.shard_tools.sources.tar_index import TarIndex, scan_tar
from mpmae.shard_tools.sources.zarr_sets import (
    Folders,
    Sample,
    ZarrOptions,
    ZarrSource,
    find_folders,
    probe_layer,
    read_sample,
    splits_of,
)
from mpmae.shard_tools.sources.zarr_zip import ZarrZip

SUFFIX = ".zarr.zip"
_Indices = dict[str, tuple[int, TarIndex]]
_NUM_SCANS = 8


@dataclass
class Members:
    """Where a layer's samples lie: per image the number of its tar (-1: it has none), data offset and size."""

    tar: list[np.ndarray] = field(default_factory=list)
    offset: list[np.ndarray] = field(default_factory=list)
    size: list[np.ndarray] = field(default_factory=list)

    def add(self, tar: np.ndarray, offset: np.ndarray, size: np.ndarray) -> None:
        """Append the members of a shard."""
        self.tar.append(tar.astype(np.int32))
        self.offset.append(offset)
        self.size.append(size)

    def joined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All shards after one another."""
        return np.concatenate(self.tar), np.concatenate(self.offset), np.concatenate(self.size)


class Tally:
    """What has no counterpart in another layer, counted, with a few examples."""

    def __init__(self, join: str):
        fate = "are left out" if join == "inner" else "lack it"
        self._texts = {
            "samples": "{name}: {num} samples with Sentinel-2 have none ({examples}); they " + fate,
            "orphans": "{name}: {num} samples have no Sentinel-2 ({examples}); they are left out",
            "shards": "{name}: no tar for {num} shards ({examples}); their tiles lack it",
        }
        self._found: dict[tuple[str, str], tuple[int, list[str]]] = {}

    def add(self, what: str, name: str, items: list[str]) -> None:
        """Count `items` of layer `name`."""
        num, some = self._found.get((what, name), (0, []))
        self._found[what, name] = num + len(items), [*some, *items[: NUM_EXAMPLES + 1]][: NUM_EXAMPLES + 1]

    def add_samples(self, name: str, shard: str, lacking: np.ndarray, keys: np.ndarray, main: np.ndarray) -> None:
        """Count the samples of a shard that layer `name` lacks, and those of its `keys` that Sentinel-2 (`main`) lacks."""
        orphans = keys[~np.isin(keys, main)]
        for what, some in (("samples", lacking), ("orphans", orphans)):
            if len(some):
                self.add(what, name, [f"{key.decode(errors='replace')} of {shard}" for key in some])

    def notes(self) -> list[str]:
        """A line per layer and kind of gap."""
        return [
            self._texts[what].format(name=name, num=num, examples=examples(some))
            for (what, name), (num, some) in self._found.items()
        ]


class ZarrTarSource(ZarrSource):
    """A set of such tars. SourceError with every problem of the tars at once."""

    def __init__(self, path: Path, options: ZarrOptions, what: str):
        folders = find_folders(path, options, what)
        self._tars: list[Path] = []
        notes = self._join(folders, options)
        probes = {name: self._probe(name, folders, options) for name in folders.modalities}
        probes = {name: probe for name, probe in probes.items() if probe is not None}
        problem = same_size({name: sample.size_px for name, (_, sample) in probes.items()})
        if problem:
            raise SourceError(f"{path}: {problem}; leave layers out with the option modalities")
        main = probes["sentinel2"][1]
        splits, split_of = splits_of(list(folders.by_split), self._keys, self._split_of, options)
        super().__init__(
            path,
            Images(self._keys, np.array([main.size_px], np.int64), len(main.values), splits, split_of),
            {name: layer for name, (layer, _) in probes.items()},
            options,
            content=[[str(tar.relative_to(path)), tar.stat().st_size] for tar in self._tars],
            has_place=bool(np.isfinite(main.lat_deg) or main.time_ns(0) is not None),
            notes=notes,
        )

    def _join(self, folders: Folders, options: ZarrOptions) -> list[str]:
        """Fills `_keys`, `_split_of` and `_members`; what has no counterpart comes back as notes."""
        found = {name: Members() for name in folders.modalities}
        keys, split_of, problems = [], [], []
        tally = Tally(options.join)
        for number, (split, layers) in enumerate(folders.by_split.items()):
            for shard, indices in self._scan_shards(layers, problems):
                main = indices["sentinel2"][1]
                at = {name: _positions(main.keys, index.keys) for name, (_, index) in indices.items()}
                kept = np.ones(len(main.keys), bool)
                for name, position in at.items():
                    kept &= (position >= 0) | (options.join == "sentinel2")
                    tally.add_samples(name, shard, main.keys[position < 0], indices[name][1].keys, main.keys)
                for name in folders.modalities:
                    if name in indices:
                        (tar, index), position = indices[name], at[name][kept]
                        found[name].add(np.where(position < 0, -1, tar), index.offsets[position], index.sizes[position])
                    else:
                        tally.add("shards", name, [f"{split}/{shard}".lstrip("/")])
                        absent = np.full(kept.sum(), -1)
                        found[name].add(absent, absent, absent)
                keys.append(main.keys[kept])
                split_of.append(np.full(kept.sum(), number))
        if problems:
            raise SourceError(problems)
        self._keys, self._split_of = np.concatenate(keys), np.concatenate(split_of)
        self._members = {name: members.joined() for name, members in found.items()}
        return tally.notes()

    def _scan_shards(
        self, layers: dict[str, Path], problems: list[str]
    ) -> Iterator[tuple[str, dict[str, tuple[int, TarIndex]]]]:
        """Per shard that Sentinel-2 has, the tar number and index of every layer that has it too."""
        shards = sorted(path.name for path in layers["sentinel2"].glob("*.tar"))
        if not shards:
            problems.append(f"{layers['sentinel2']} has no *.tar")

        def scan(path: Path) -> TarIndex | SourceError:
            try:
                return scan_tar(path, SUFFIX)
            except SourceError as error:
                return error

        with ThreadPoolExecutor(_NUM_SCANS) as pool:
            for shard in shards:
                paths = {name: folder / shard for name, folder in layers.items() if (folder / shard).is_file()}
                indices = {}
                for (name, path), index in zip(paths.items(), pool.map(scan, paths.values()), strict=True):
                    if isinstance(index, SourceError):
                        problems += index.problems
                    else:
                        indices[name] = len(self._tars), index
                        self._tars.append(path)
                if "sentinel2" in indices:
                    yield shard, indices

    def _probe(self, name: str, folders: Folders, options: ZarrOptions):
        """Layer and first sample of a modality; None where no kept image has it."""
        has = np.flatnonzero(self._members[name][0] >= 0)
        if not len(has):
            if name == "sentinel2":
                raise SourceError(f"no sample has all of {', '.join(folders.modalities)}; try the option join=sentinel2")
            return None
        image = int(has[0])
        where = f"{self._tars[self._members[name][0][image]]}, {self._keys[image].decode(errors='replace')}"
        try:
            with ZarrZip(self._bytes(name, image)) as archive:
                sample = read_sample(archive)
                layer = probe_layer(where, name, archive.texts("band"), sample.values.shape[1], sample.values.dtype, options)
                return layer, sample
        except UnreadableError as error:
            raise SourceError(f"{where}: {error}; download the file again") from error

    def _load(self, name: str, cut: Cut) -> Sample | None:
        if self._members[name][0][cut.image] < 0:
            return None

        def load() -> tuple[Sample, int]:
            with ZarrZip(self._bytes(name, cut.image)) as archive:
                sample = read_sample(archive)
            return sample, sample.values.nbytes

        return self._cache.get((name, cut.image), load)

    def _bytes(self, name: str, image: int) -> bytes:
        tar, offset, size = (int(column[image]) for column in self._members[name])
        try:
            with self._tars[tar].open("rb") as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise UnreadableError(f"{self._tars[tar]} cannot be read ({error})") from error
        if len(data) != size:
            raise UnreadableError(f"{self._tars[tar]} ends {size - len(data)} bytes early")
        return data


def _positions(wanted: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each of `wanted` lies in the sorted `keys`; -1 for those that are not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, -1)
