"""A folder of GeoTIFFs with a CSV table of their labels.

Shapes: B bands, H x W pixels, K classes.

    file         the image, relative to the table
    label        class name, or index into classes.txt; several separated by ";" make a multi-label set; or instead of it
    label_file   a label map of the same size: class indices, its no-data value where there is no label
    split        optional: train, val (or valid, validation), test
    bands        optional: names separated by ";", where the files do not describe their bands

Names of the classes in their order may stand in classes.txt beside the table, one a line.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpmae.errors import DatasetError, SourceError
from mpmae.eval.bands import plain_band
from mpmae.eval.dataset import IGNORED, SPLITS, StoredBand, Task
from mpmae.eval.reading import METRICS, SPLIT_NAMES, checked_map, checked_splits, few, with_statistics
from mpmae.in_order import in_order
from mpmae.shard_tools.sources.foreign import UnreadableError
from mpmae.shard_tools.sources.rasters import Header, read_header, read_image

_SEPARATOR = ";"


@dataclass(frozen=True)
class _Row:
    file: str
    label: str
    label_file: str
    split: str
    bands: str


class GeoTiffTable:
    """Images and labels of a table, see this module and `mpmae.eval.dataset.LabelledSet`.

    path: the CSV file. product_level: "l1c" or "l2a"; "auto" and "none": not known, since a GeoTIFF does not say. Band
    statistics are of the training split, else of all samples. Raises DatasetError with every problem at once.
    """

    def __init__(self, path: Path, product_level: str = "auto", progress: bool = True):
        self.path = Path(path)
        self._rows = _rows(self.path)
        absent = [
            name
            for row in self._rows
            for name in (row.file, row.label_file)
            if name and not (self.path.parent / name).is_file()
        ]
        if absent:
            raise DatasetError(f"{self.path}: {len(absent):,} of its files are not there: {few(absent)}")
        kind = _kind(self._rows, self.path)
        names = self._bands()
        self.splits = checked_splits(_splits(self._rows, self.path), len(self._rows), str(self.path))
        self.task = Task(
            name=self.path.parent.name if self.path.stem in ("labels", "table") else self.path.stem,
            kind=kind,
            class_names=self._class_names(kind),
            bands=tuple(StoredBand(*plain_band(name), 0.0, 1.0) for name in names),
            metric=METRICS[kind],
            product_level=product_level if product_level in ("l1c", "l2a") else None,
        )
        self._index = {name: position for position, name in enumerate(self.task.class_names)}
        if not any(name.isdecimal() for name in self._index):
            self._index |= {str(position): position for position in self._index.values()}
        self.task = with_statistics(self, self.splits.get("train", np.arange(len(self))), progress)

    def __len__(self) -> int:
        return len(self._rows)

    def sample_id(self, index: int) -> str:
        """The file as the table names it."""
        return self._rows[index].file

    def image(self, index: int) -> np.ndarray:
        """float32 [B, H, W], NaN where the file has its no-data value."""
        path = self.path.parent / self._rows[index].file
        values, fills = _read(path, read_image)
        if len(values) != len(self.task.bands):
            raise DatasetError(f"{path}: {len(values)} bands; expected {len(self.task.bands)}: {few(self.task.band_names)}")
        image = values.astype(np.float32)
        for stored, band, fill in zip(values, image, fills, strict=True):
            if fill is not None:
                band[stored == fill] = np.nan
        return image

    def label(self, index: int) -> np.ndarray:
        """The label of a sample, see `LabelledSet.label`."""
        row = self._rows[index]
        if self.task.kind == "segmentation":
            label = self._label_map(row)
            size_px = _read(self.path.parent / row.file, read_header).size_px
            if label.shape != size_px:
                raise DatasetError(
                    f"{self.path}: {row.label_file} of {list(label.shape)} px for {row.file} of {list(size_px)} px; "
                    "expected the same size"
                )
            return checked_map(label, self.task, str(self.path.parent / row.label_file))
        classes = [self._class(name, row) for name in _labels(row)]
        if self.task.kind == "multiclass":
            return np.asarray(classes[0], np.int64)
        label = np.zeros(self.task.num_classes, bool)
        label[classes] = True
        return label

    def location(self, index: int) -> tuple[float, float] | None:
        """(latitude, longitude) of the centre, or None without a reference system."""
        path = self.path.parent / self._rows[index].file
        header = _read(path, read_header)
        height, width = header.size_px
        latitude, longitude = _read(path, lambda _: header.place(height / 2, width / 2, height, width))
        return (float(latitude), float(longitude)) if np.isfinite([latitude, longitude]).all() else None

    def present_classes(self) -> None:
        """None: the labels have to be read."""

    def _class(self, name: str, row: _Row) -> int:
        if name not in self._index:
            raise DatasetError(f"{self.path}: {row.file} has the label {name!r}; expected {few(self.task.class_names)}")
        return self._index[name]

    def _label_map(self, row: _Row) -> np.ndarray:
        path = self.path.parent / row.label_file
        values, fills = _read(path, read_image)
        if len(values) != 1 or values.dtype.kind not in "iuf":
            raise DatasetError(f"{path}: {len(values)} bands of {values.dtype}; expected one of class indices")
        label = values[0].astype(np.float64)
        is_fill = np.isnan(label)
        if fills[0] is not None:
            is_fill |= values[0] == fills[0]
        label[is_fill] = IGNORED
        return label

    def _bands(self) -> list[str]:
        """Names of the bands, of the table or of the first file; every file must have the same."""
        first = self._rows[0]
        headers = in_order(lambda row: _read(self.path.parent / row.file, read_header), self._rows)
        names, problems = None, []
        for row, header in zip(self._rows, headers, strict=True):
            found = _names(row, header)
            if found is None:
                problems.append(
                    f"{row.file}: {len(header.bands)} bands without descriptions; name them in the column `bands`, such as "
                    "B2;B3;B4"
                )
            elif names is not None and found != names:
                problems.append(f"{row.file}: bands {few(found)}; {first.file} has {few(names)}")
            names = names or found
        if problems:
            raise DatasetError([f"{self.path}: {problem}" for problem in problems[:10]])
        return names

    def _class_names(self, kind: str) -> tuple[str, ...]:
        listed = self.path.parent / "classes.txt"
        if listed.is_file():
            names = tuple(line.strip() for line in listed.read_text().splitlines() if line.strip())
            if len(set(names)) < len(names) or not names:
                raise DatasetError(f"{listed}: {len(names)} names, {len(set(names))} different; expected each class once")
            return names
        if kind == "segmentation":
            num = 1 + int(max(label.max() for label in in_order(self._label_map, self._rows)))
            return tuple(f"class {i}" for i in range(num))
        names = {name for row in self._rows for name in _labels(row)}
        return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def _rows(path: Path) -> list[_Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = [str(name).strip() for name in reader.fieldnames or ()]
            rows = [{str(k).strip(): (v or "").strip() for k, v in row.items() if k is not None} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: not a readable CSV table ({error})") from error
    if "file" not in columns or not {"label", "label_file"} & set(columns) or not rows:
        raise DatasetError(
            f"{path}: {len(rows)} rows with the columns {few(columns) or '(none)'}; expected rows with `file`, and "
            "`label` or `label_file`"
        )
    keys = _Row.__dataclass_fields__
    rows = [_Row(**{key: row.get(key, "") for key in keys}) for row in rows]
    names = [row.file for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice or "" in names:
        raise DatasetError(f"{path}: files named twice or not at all: {few(twice or ['(empty)'])}; expected each once")
    return rows


def _kind(rows: list[_Row], path: Path) -> str:
    without = [row.file for row in rows if not (row.label_file or row.label)]
    mixed = {bool(row.label_file) for row in rows}
    if len(mixed) > 1 or (without and not any(_SEPARATOR in row.label for row in rows)):
        raise DatasetError(
            f"{path}: {len(without) or 'some'} rows without a label ({few(without)}); expected one in every row"
        )
    if mixed == {True}:
        return "segmentation"
    return "multilabel" if any(_SEPARATOR in row.label for row in rows) else "multiclass"


def _labels(row: _Row) -> list[str]:
    return [name.strip() for name in row.label.split(_SEPARATOR) if name.strip()]


def _splits(rows: list[_Row], path: Path) -> dict[str, list[int]]:
    splits: dict[str, list[int]] = {}
    unknown = sorted({row.split for row in rows if row.split and row.split.lower() not in SPLIT_NAMES})
    if unknown:
        raise DatasetError(f"{path}: the splits {few(unknown)}; expected {', '.join(SPLITS)}, or none for a sample left out")
    for index, row in enumerate(rows):
        if row.split:
            splits.setdefault(SPLIT_NAMES[row.split.lower()], []).append(index)
    return splits


def _names(row: _Row, header: Header) -> list[str] | None:
    names = [name.strip() for name in row.bands.split(_SEPARATOR)] if row.bands else list(header.bands)
    return names if len(names) == len(header.bands) and all(names) else None


def _read(path: Path, read):
    try:
        return read(path)
    except UnreadableError as error:
        raise DatasetError(f"{path}: {error}") from error
    except SourceError as error:
        raise DatasetError(f"{path}: GeoTIFFs need the package rasterio; pip install mpmae[eval]") from error
