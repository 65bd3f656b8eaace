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
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

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
        available = next(entry.bands for entry in self.pixels if entry.name == "sentinel2")
        rows = band_indices("sentinel2", tuple(bands), available)
        levels = [f"sentinel2_{level}" for level in PRODUCT_LEVELS if f"sentinel2_{level}" in self.band_stats]
        return {
            key: {name: [getattr(self.band_stats[key], name)[row] for row in rows] for name in ("mean", "std")}
            for key in levels
        }

    def dump(self) -> str:
        """The text of manifest.json."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def load_manifest(shards_dir: str | Path) -> Manifest:
    """Read and check `manifest.json`; ShardError naming the file, the field and what to do."""
    path = Path(shards_dir) / MANIFEST_NAME
    if not path.is_file():
        what = "has no manifest.json (an unfinished build?)" if Path(shards_dir).is_dir() else "does not exist"
        raise ShardError(f"{shards_dir} {what}; make a shard set with `mpmae-shards build SOURCE OUTPUT`")
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror or error}); check the disk and the permissions") from error
    except ValueError as error:
        raise ShardError(f"{path} is not JSON ({error}); rebuild the set or restore the file") from error
    if not isinstance(raw, Mapping) or raw.get("format") != FORMAT_NAME:
        raise ShardError(f"{path} is not a manifest of an mpmae shard set (its `format` is not {FORMAT_NAME!r})")
    if raw.get("format_version") not in READABLE_VERSIONS:
        raise ShardError(
            f"{path}: format_version {raw.get('format_version')}, this version of mpmae reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}; update mpmae or rebuild the set"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        problems = []
        for e in error.errors():
            own = e.get("ctx", {}).get("error")  # what `Manifest._check` found
            problems += own.args if isinstance(own, ValueError) else [f"{'.'.join(map(str, e['loc']))}: {e['msg']}"]
        raise ShardError([f"{path}: {problem}; rebuild the set or restore the file" for problem in problems]) from error


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


def tar_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one USTAR member with fixed owner, mode and time."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % tarfile.BLOCKSIZE)


TAR_HEADER_BYTES = tarfile.BLOCKSIZE
TAR_END = b"\0" * (2 * tarfile.BLOCKSIZE)


def index_bytes(rows: np.ndarray) -> bytes:
    """The .index.npy bytes of index rows (`manifest.index_dtype`)."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


def load_index(path: Path, manifest: Manifest, shard: ShardEntry) -> np.ndarray:
    """Index rows of a shard; ShardError when the file is absent, has changed or does not fit the manifest."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{path} is missing; restore it or rebuild the set") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot read the index ({error}); run `mpmae-shards verify`") from error
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise ShardError(f"{path}: its sha256 is not the manifest's: its bytes have changed; restore or rebuild it")
    try:
        rows = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise ShardError(f"{path}: cannot read the index ({error}); run `mpmae-shards verify`") from error
    if rows.dtype != manifest.index_dtype or rows.shape != (shard.num_samples,):
        raise ShardError(
            f"{path}: {rows.shape} rows of {rows.dtype}, expected {shard.num_samples} of {manifest.index_dtype}"
        )
    total = np.uint64(shard.num_bytes)
    size = rows["size"].astype(np.uint64)
    outside = (size > total) | (rows["offset"] > total - np.minimum(size, total))
    if outside.any():
        sample, member = np.argwhere(outside)[0].tolist()
        raise ShardError(
            f"{path}: {outside.sum()} members lie outside the {shard.num_bytes} bytes of {shard.name}, first "
            f"{manifest.members[member]} of sample {sample} ({size[sample, member]} bytes at "
            f"{rows['offset'][sample, member]}); rebuild the set or restore the file"
        )
    return rows
