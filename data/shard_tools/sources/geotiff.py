"""A folder of GeoTIFFs: one folder per modality, one file per image.

    MODALITY / NAME.tif   or   SPLIT / MODALITY / NAME.tif

MODALITY is a name of `mpmae.modalities` (sentinel2, sentinel1, dem, ...), NAME the image's name in all of them, which
becomes its tile id. Bands are known by their descriptions in the file (B02 or B2, VV, asc_VV, ...) or by the option
bands_MODALITY=B1,B2,...; a file of one band needs neither. A modality of fewer pixels than sentinel2 is brought to its
grid by repeating them. Place and month come from the CRS and TIFFTAG_DATETIME of the sentinel2 files.
"""

import re
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpmae.errors import SourceError
from mpmae.modalities import MODALITIES
from mpmae.shard_tools.source_checks import examples
from mpmae.shard_tools.sources.foreign import UnreadableError
from mpmae.shard_tools.sources.image_source import Cut, Images, ImageSource, Place, seeded_splits
from mpmae.shard_tools.sources.layers import ORBITS, Layer, make_layer
from mpmae.shard_tools.sources.options import Options, product_level
from mpmae.shard_tools.sources.rasters import Header, read_header, read_window

_SUFFIXES = (".tif", ".tiff")
_NUM_OPENS = 4
_MAX_PROBLEMS = 20
# name -> path of the images of one modality of one split.
_Files = dict[str, Path]


class GeoTiffSource(ImageSource):
    """Tiles of a folder of GeoTIFFs. SourceError with the problems of the files at once, the first twenty spelled out.

    Options: tile_size_px (default: the whole image, which must then be square and of one size), modalities, sentinel2 (l2a
    or l1c), orbit (asc or desc: the pass of radar bands that do not name theirs), bands_NAME, and, for a folder without
    splits, val_fraction and split_seed.
    """

    def __init__(self, path: Path, given: Mapping[str, str]):
        options = Options("geotiff", given)
        tile_size_px, wanted = options.whole("tile_size_px", None, 1), options.names("modalities")
        level, orbit = product_level(options), options.choice("orbit", ("", *ORBITS))
        bands = options.prefixed("bands_")
        val_fraction, seed = options.fraction("val_fraction", 0.1), options.whole("split_seed", 0, 0)
        options.problems += [f"option bands_{name}: no such modality" for name in bands if name not in MODALITIES]
        options.check()

        splits = _find(path, wanted)
        keys = np.array([key.encode() for files in splits.values() for key in files["sentinel2"]])
        split_of = np.repeat(np.arange(len(splits)), [len(files["sentinel2"]) for files in splits.values()])
        split_names = tuple(splits)
        if split_names == ("",):
            split_names, split_of = seeded_splits(keys, val_fraction, seed)
        names = dict.fromkeys(name for files in splits.values() for name in files)
        self._paths = {name: [f.get(name, {}).get(key) for f in splits.values() for key in f["sentinel2"]] for name in names}
        headers, layers = _check(path, self._paths, bands, orbit)
        self._headers: list[Header] = headers
        sizes_px = np.array([header.size_px for header in headers], np.int64)
        super().__init__(
            path,
            images=Images(keys, sizes_px, 1, split_names, split_of),
            layers=layers,
            tile_size_px=tile_size_px or _whole_images(path, sizes_px),
            product_level=level,
            content=[sorted(given.items()), [_stamp(p, path) for paths in self._paths.values() for p in paths if p]],
            has_place=any(header.crs or _month(header) for header in headers),
            notes=_gaps(splits, self._paths),
        )

    def _read(self, name: str, cut: Cut) -> np.ndarray | None:
        path = self._paths[name][cut.image]
        if path is None:
            return None
        values, fills = read_window(path, cut.top, cut.left, cut.side, self._headers[cut.image].size_px)
        try:
            return self._layers[name].convert(values, fills)
        except ValueError as error:
            raise UnreadableError(str(error)) from error

    def _place(self, cut: Cut) -> Place:
        header = self._headers[cut.image]
        lat, lon = header.place(cut.top + cut.side / 2, cut.left + cut.side / 2, *header.size_px)
        return Place(lat, lon, _month(header))


def _find(path: Path, wanted: tuple[str, ...] | None) -> dict[str, dict[str, _Files]]:
    """Per split ("" for a folder without splits) and modality, the files by image name."""
    if not path.is_dir():
        raise SourceError(f"{path} {'is a file' if path.exists() else 'does not exist'}; give the folder of the GeoTIFFs")

    def layers(folder: Path) -> dict[str, _Files]:
        there = [name for name in MODALITIES if (folder / name).is_dir() and MODALITIES[name].scope == "pixel"]
        return {
            name: {p.stem: p for p in sorted((folder / name).iterdir()) if p.suffix.lower() in _SUFFIXES}
            for name in there
            if wanted is None or name in wanted
        }

    splits = {"": layers(path)} if layers(path) else {s.name: layers(s) for s in sorted(path.iterdir()) if s.is_dir()}
    splits = {split: files for split, files in splits.items() if files}
    if not splits:
        raise SourceError(
            f"{path}: expected MODALITY/NAME.tif or SPLIT/MODALITY/NAME.tif with modalities such as sentinel2, found "
            f"{examples(sorted(p.name for p in path.iterdir())) or 'nothing'}"
        )
    there = {name for files in splits.values() for name in files}
    problems = [f"{path} has no folder for modality {name!r}" for name in wanted or () if name not in there]
    problems += [
        f"{path / split} has no sentinel2 images, which every tile must have"
        for split, files in splits.items()
        if not files.get("sentinel2")
    ]
    if problems:
        raise SourceError(problems)
    return splits


def _check(
    path: Path, paths: Mapping[str, list[Path | None]], bands: Mapping[str, tuple[str, ...]], orbit: str
) -> tuple[list[Header], dict[str, Layer]]:
    """The headers of the sentinel2 images and the layer of every modality, all files having been looked at."""
    problems: list[str] = []
    headers: dict[str, list[Header | None]] = {}
    with ThreadPoolExecutor(_NUM_OPENS) as pool:
        for name, files in paths.items():
            headers[name] = list(pool.map(lambda file: _header(file, problems), files))
    layers = {}
    for name, found in headers.items():
        known = [(file, header) for file, header in zip(paths[name], found, strict=True) if header is not None]
        if not known:
            continue
        first_file, first = known[0]
        try:
            layers[name] = _layer(name, first, bands.get(name), orbit)
        except ValueError as error:
            problems.append(f"{first_file}: {error}; name them with the option bands_{name}=...")
        for file, header in known:
            if (header.dtype, header.bands) != (first.dtype, first.bands):
                problems.append(f"{file}: bands {_told(header)}, expected {_told(first)} as in {first_file.name}")
    for name, found in headers.items():
        for file, header, main in zip(paths[name], found, headers["sentinel2"], strict=True):
            if header is not None and main is not None and not _divides(header.size_px, main.size_px):
                problems.append(
                    f"{file}: {header.size_px[0]} x {header.size_px[1]} px, expected the {main.size_px[0]} x "
                    f"{main.size_px[1]} of sentinel2 or that divided by a whole number"
                )
    if problems:
        more = [f"{path}: and {len(problems) - _MAX_PROBLEMS} problems more"] if len(problems) > _MAX_PROBLEMS else []
        raise SourceError([*problems[:_MAX_PROBLEMS], *more])
    return headers["sentinel2"], layers


def _header(file: Path | None, problems: list[str]) -> Header | None:
    if file is None:
        return None
    try:
        header = read_header(file)
    except UnreadableError as error:
        problems.append(f"{file}: {error}; restore the file or take it out of the folder")
        return None
    # A set has a few CRSs and a million images.
    return replace(header, crs=sys.intern(header.crs) if header.crs else None)


def _layer(name: str, header: Header, given: tuple[str, ...] | None, orbit: str) -> Layer:
    file_bands = given or (header.bands if all(header.bands) else None)
    if file_bands is None and len(header.bands) > 1:
        raise ValueError(f"{len(header.bands)} bands without descriptions")
    if given and len(given) != len(header.bands):
        raise ValueError(f"{len(header.bands)} bands, but {len(given)} names")
    layer = make_layer(name, file_bands, len(header.bands), header.dtype, orbit)
    if len(set(layer.order)) < len(layer.order):
        raise ValueError(f"bands {', '.join(file_bands)} name no pass; give the option orbit=asc or orbit=desc, or")
    return layer


def _divides(size_px: tuple[int, int], grid_px: tuple[int, int]) -> bool:
    ratio = grid_px[0] // max(size_px[0], 1)
    return ratio > 0 and (size_px[0] * ratio, size_px[1] * ratio) == grid_px


def _told(header: Header) -> str:
    return f"{len(header.bands)} of {header.dtype} ({', '.join(header.bands).strip(', ') or 'without names'})"


def _whole_images(path: Path, sizes_px: np.ndarray) -> int:
    height, width = map(int, sizes_px[0])
    if height != width or (sizes_px != sizes_px[0]).any():
        raise SourceError(f"{path}: the images are not squares of one size; give the option tile_size_px")
    return height


def _month(header: Header) -> int | None:
    match = re.match(r"\d{4}[:-](\d\d)[:-]\d\d", header.taken)
    return int(match[1]) if match and 1 <= int(match[1]) <= 12 else None


def _stamp(file: Path, root: Path) -> list:
    return [str(file.relative_to(root)), file.stat().st_size]


def _gaps(splits: dict[str, dict[str, _Files]], paths: Mapping[str, list[Path | None]]) -> list[str]:
    notes = []
    for name, files in paths.items():
        lacking = [main.stem for main, file in zip(paths["sentinel2"], files, strict=True) if file is None]
        if lacking:
            notes.append(f"{name}: {len(lacking)} images have none ({examples(lacking)}); their tiles lack it")
        orphans = [key for split in splits.values() for key in split.get(name, {}) if key not in split["sentinel2"]]
        if orphans:
            notes.append(f"{name}: {len(orphans)} images have no sentinel2 ({examples(orphans)}); they are left out")
    return notes
