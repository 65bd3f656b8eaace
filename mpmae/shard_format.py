"""The shard set on disk: what the writer writes and every reader reads.

A shard set is a folder:

    manifest.json            what is in the set: modalities, splits, shards with hashes, band statistics
    train-00000.tar          WebDataset tar (USTAR): per sample one member per pixel modality, then `scalars`
    train-00000.index.npy    one row per sample: source row, presence bits, member offsets and sizes
    train-00000.idx          the same offsets in DALI's text form

Member names are `KEY.MODALITY.CODEC` (`00000012.sentinel2.lz4`), KEY counting the samples of a split, so plain `webdataset`
groups them too. All numbers are little-endian. Writing is byte-reproducible: fixed owner, mode and time.

Shapes: C bands, P tile side in pixels, M members of a sample.
"""

import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator

from mpmae.errors import ConfigError, ShardError
from mpmae.manifest_checks import manifest_problems
from mpmae.modalities import PRODUCT_LEVELS, Kind, NoData, band_indices, no_data_rule

FORMAT_NAME = "mpmae-shards"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST_NAME = "manifest.json"
SCALARS_MEMBER = "scalars"
Codec = Literal["raw", "lz4", "zstd"]
Filter = Literal["none", "delta-planes"]
QUANTISED_DTYPE = np.dtype("<i2")
QUANTISED_MINUS_INF, QUANTISED_NAN, QUANTISED_PLUS_INF = -32768, -32767, 32767
QUANTISED_MAX_COUNT = 32766


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantisation(_Strict):
    """A float modality stored as int16 counts of `step`: the only lossy storage, and only on request.

    Three codes stand for -inf, NaN and +inf, so that absent values survive exactly; finite values use the codes between.
    max_error: a bound of |decoded - source| over finite values, in the modality's unit: half a step, and what the rounding
    of quotient, product and dtype can add (less than three spacings of the dtype at the end of the range).
    """

    step: float
    max_error: float

    @classmethod
    def of(cls, step: float, dtype: np.dtype) -> "Quantisation":
        """Counts of `step` for floats of `dtype`; ConfigError when it is not a number above 0 or not for floats."""
        with np.errstate(over="ignore"):  # told below
            end = dtype.type(step * QUANTISED_MAX_COUNT) if dtype.kind == "f" else np.nan
        if not (step > 0 and np.isfinite(end)):
            raise ConfigError(
                f"quantisation of {dtype.name} in steps of {step:g}; expected a float modality and a step above 0"
            )
        return cls(step=step, max_error=step / 2 + 3 * float(np.spacing(end)))


class PixelEntry(_Strict):
    """A pixel modality of the set: one tar member [C, P, P] per sample.

    dtype is that of the source and of what a reader gets; with `quantisation` the stored words are int16.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, int, int]
    bands: tuple[str, ...]
    codec: Codec
    filter: Filter
    no_data: NoData
    quantisation: Quantisation | None = None

    @property
    def stored_dtype(self) -> np.dtype:
        """The dtype of the words that filter and codec see."""
        return QUANTISED_DTYPE if self.quantisation else np.dtype(self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Bytes of a member once decompressed."""
        return math.prod(self.shape) * self.stored_dtype.itemsize


class ScalarEntry(_Strict):
    """A field of the `scalars` member. `one_hot` rows [K] are stored as one class id (see `pack_one_hot`)."""

    name: str
    dtype: str
    length: int
    encoding: Literal["plain", "one_hot"]
    no_data: NoData


class BandStats(_Strict):
    """Per-band statistics over valid values, in raw units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]


class ShardEntry(_Strict):
    """One tar of the set with its index."""

    name: str
    num_bytes: int
    num_samples: int
    sha256: str
    index_sha256: str


class SourceInfo(_Strict):
    """Where the samples came from; `fingerprint` changes when the source's content does."""

    name: str
    fingerprint: str
    num_tiles: int


class Manifest(_Strict):
    """manifest.json. `band_stats` is keyed by modality, sentinel2 by product level (`sentinel2_l1c`, `sentinel2_l2a`)."""

    format: Literal["mpmae-shards"] = FORMAT_NAME
    format_version: int = FORMAT_VERSION
    source: SourceInfo
    tile_size_px: int
    codec: Codec
    seed: int
    pixels: tuple[PixelEntry, ...]
    scalars: tuple[ScalarEntry, ...]
    band_stats: dict[str, BandStats]
    splits: dict[str, tuple[ShardEntry, ...]]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        problems = manifest_problems(self)
        if problems:
            raise ValueError(*problems)
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of all modalities; bit i of a sample's presence word belongs to the i-th."""
        return tuple(e.name for e in self.pixels) + tuple(e.name for e in self.scalars)

    @property
    def members(self) -> tuple[str, ...]:
        """Member kinds of a sample in tar order: the pixel modalities, then `scalars`."""
        return (*(e.name for e in self.pixels), SCALARS_MEMBER)

    @property
    def index_dtype(self) -> np.dtype:
        """Row type of the index arrays of this set."""
        num_members = len(self.members)
        return np.dtype(
            [("row", "<u8"), ("presence", "<u8"), ("offset", "<u8", (num_members,)), ("size", "<u4", (num_members,))]
        )

    @property
    def scalars_dtype(self) -> np.dtype:
        """Packed record type of the `scalars` member: tile_id, product_level, then one field per scalar modality."""
        fields: list[tuple] = [("tile_id", "S100"), ("product_level", "S10")]
        for entry in self.scalars:
            fields.append((entry.name, "<i2") if entry.encoding == "one_hot" else (entry.name, entry.dtype, (entry.length,)))
        return np.dtype(fields)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the set's content: the modality tables and every shard's hash, in order."""
        content = self.model_dump(mode="json", include={"pixels", "scalars", "band_stats", "splits"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def num_samples(self, split: str) -> int:
        """Samples of a split; ShardError naming the splits there are."""
        return sum(shard.num_samples for shard in self.shards(split))

    def shards(self, split: str) -> tuple[ShardEntry, ...]:
        """Shards of a split, in order; ShardError for an unknown split."""
        if split not in self.splits:
            raise ShardError(f"the shard set has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]

    def input_statistics(self, bands: Sequence[str]) -> dict[str, dict[str, list[float]]]:
        """Mean and std of Sentinel-2 `bands`, in raw units, by key of `band_stats` (`sentinel2_l1c`, `sentinel2_l2a`)."""
        table = self.statistics_of("sentinel2", bands)
        return {key: {name: entry[name] for name in ("mean", "std")} for key, entry in table.items()}

    def statistics_of(self, modality: str, bands: Sequence[str]) -> dict[str, dict[str, list]]:
        """Names, mean and std of `bands` of a pixel modality, in raw units: by key of `band_stats`.

        The key is the modality's name; Sentinel-2 has one for each product level. Raises ShardError if the set lacks it.
        """
        available = next((entry.bands for entry in self.pixels if entry.name == modality), None)
        if available is None:
            raise ShardError(f"the shard set has no {modality}; it has {', '.join(self.modalities)}")
        rows = band_indices(modality, tuple(bands), available)
        keys = [modality, *(f"{modality}_{level}" for level in PRODUCT_LEVELS)]
        return {
            key: {
                "bands": list(bands),
                **{name: [getattr(self.band_stats[key], name)[row] for row in rows] for name in ("mean", "std")},
            }
            for key in keys
            if key in self.band_stats
        }

    def dump(self) -> str:
        """The text of manifest.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def index_name(shard_name: str) -> str:
    """`train-00000.tar` -> `train-00000.index.npy`."""
    return Path(shard_name).stem + ".index.npy"


def dali_index_name(shard_name: str) -> str:
    """`train-00000.tar` -> `train-00000.idx`."""
    return Path(shard_name).stem + ".idx"


def pixel_entry(
    name: str, kind: Kind, array_dtype: np.dtype, shape, bands, codec: Codec, quantise_step: float | None = None
) -> PixelEntry:
    """The manifest entry of a pixel modality: filter and no-data rule follow the dtype.

    quantise_step: store floats as int16 counts of this, in the modality's unit (None: lossless). Raises ConfigError for a
    step that is no number above 0, for integers, and where a finite value stands for no data.
    """
    dtype = np.dtype(array_dtype).newbyteorder("<")
    quantisation, no_data = None, no_data_rule(name, dtype)
    if quantise_step is not None:
        quantisation = Quantisation.of(quantise_step, dtype)
        if no_data.codes:
            raise ConfigError(f"{name} cannot be quantised: its no-data value {no_data.codes[0]} would change")
    use_filter = codec != "raw" and (quantisation is not None or dtype.itemsize > 1)
    return PixelEntry(
        name=name,
        kind=kind,
        dtype=dtype.str,
        shape=tuple(shape),
        bands=tuple(bands),
        codec=codec,
        filter="delta-planes" if use_filter else "none",
        no_data=no_data,
        quantisation=quantisation,
    )


def sample_key(ordinal: int) -> str:
    """WebDataset key of the `ordinal`-th sample of a split."""
    return f"{ordinal:08d}"


def member_name(key: str, member: str, codec: Codec) -> str:
    """Tar member name; the scalars are always raw."""
    return f"{key}.{member}.{'raw' if member == SCALARS_MEMBER else codec}"


def index_bytes(rows: np.ndarray) -> bytes:
    """The .index.npy bytes of index rows (`manifest.index_dtype`)."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()
