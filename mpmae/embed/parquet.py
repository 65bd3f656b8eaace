"""Parts of a folder of embeddings as parquet bytes, and back. The only module of the package that knows pyarrow.

Shapes: N tiles, D features, K classes.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpmae.embed.geoparquet import GEOMETRY, geo_metadata, known_locations, wkb_points
from mpmae.embed.source import UNKNOWN, ClassColumn, Tiles
from mpmae.embed.storage import StoredDtype, decode, encode
from mpmae.errors import ConfigError, EmbeddingError

if TYPE_CHECKING:
    from pyarrow import Array, Table

EMBEDDING, SCALE, OWN_METADATA = "embedding", "scale", "mpmae"


def require_pyarrow() -> None:
    """ConfigError when pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"embeddings are parquet files, and pyarrow is not here ({error}): pip install 'mpmae[eval]'"
        ) from None


def part_bytes(
    tiles: Tiles, vectors: np.ndarray, dtype: StoredDtype, columns: Sequence[ClassColumn], metadata: Mapping[str, Any]
) -> bytes:
    """One parquet file with the tiles and their vectors float32 [N, D] in one row group. `tiles.images` takes no part.

    metadata: goes into the file's own, under OWN_METADATA, as JSON. Raises EmbeddingError as `encode` does.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    stored, scale = encode(vectors, dtype, tiles.ids)
    known = known_locations(tiles.locations)
    arrays = {
        "id": pa.array(tiles.ids, pa.string()),
        "split": pa.array(tiles.splits, pa.string()),
        "product_level": pa.array(tiles.product_levels, pa.string()),
        "latitude": pa.array(tiles.locations[:, 0], pa.float64(), mask=~known),
        "longitude": pa.array(tiles.locations[:, 1], pa.float64(), mask=~known),
        GEOMETRY: pa.array(wkb_points(tiles.locations), pa.binary()),
        "valid_fraction": pa.array(tiles.valid_fraction, pa.float32()),
        **{column.name: _class_array(column, tiles.classes[column.name]) for column in columns},
    }
    if scale is not None:
        arrays[SCALE] = pa.array(scale, pa.float32())
    numbers = pa.array(np.ascontiguousarray(stored).reshape(-1))
    item = pa.field("element", numbers.type, nullable=False)
    arrays[EMBEDDING] = pa.FixedSizeListArray.from_arrays(numbers, type=pa.list_(item, vectors.shape[1]))
    table = pa.table(arrays).replace_schema_metadata(
        {"geo": json.dumps(geo_metadata(tiles.locations)), OWN_METADATA: json.dumps(metadata)}
    )
    sink = io.BytesIO()
    texts = ["split", "product_level", *(column.name for column in columns if not column.several)]
    pq.write_table(table, sink, row_group_size=max(len(table), 1), compression="zstd", use_dictionary=texts)
    return sink.getvalue()


def _class_array(column: ClassColumn, classes: np.ndarray) -> "Array":
    """Names of the classes: text, null where unknown, or lists of texts."""
    import pyarrow as pa

    names = column.class_names
    if column.several:
        return pa.array([[names[k] for k in np.flatnonzero(row)] for row in classes], pa.list_(pa.string()))
    return pa.array([None if k == UNKNOWN else names[k] for k in classes.tolist()], pa.string())


def read_part(path: Path) -> tuple["Table", np.ndarray]:
    """All columns of a part but the vectors, and these float32 [N, D]. Raises EmbeddingError naming the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None)
        column, has_scale = table.column(EMBEDDING), SCALE in table.column_names
        flat = pa.concat_arrays([chunk.flatten() for chunk in column.chunks]) if column.num_chunks else pa.array([])
        stored = flat.to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
        scale = table.column(SCALE).to_numpy() if has_scale else None
    except (OSError, KeyError, ValueError, AttributeError) as error:  # what pyarrow raises on bytes of another kind
        raise EmbeddingError(
            f"{path} is not a part of embeddings ({error}); run the same mpmae-embed to make it again"
        ) from None
    return table.drop_columns([EMBEDDING, *([SCALE] if has_scale else [])]), decode(stored, scale)


def joined(tables: Sequence["Table"]) -> "Table":
    """The rows of all tables, with the metadata of the first."""
    import pyarrow as pa

    return pa.concat_tables(tables)


def own_metadata(table: "Table") -> dict[str, Any]:
    """What `part_bytes` was given as metadata."""
    return json.loads(table.schema.metadata[OWN_METADATA.encode()])
