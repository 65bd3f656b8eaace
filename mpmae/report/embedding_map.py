"""A map of feature vectors as plain data: what `mpmae-embed` leaves in a folder and the report draws.

Shapes: n drawn tiles, K classes.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mpmae.errors import ReportError
from mpmae.files import write_whole

MAP_NAME = "map.json"
UNKNOWN = -1
Colour = Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Grouping(_Strict):
    """One way to colour the tiles. classes: of each drawn tile, UNKNOWN where there is none. counts: over all tiles, K."""

    title: str
    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    counts: tuple[int, ...]
    num_unknown: int
    classes: tuple[int, ...]


class EmbeddingMap(_Strict):
    """Where tiles lie among each other by their vectors, and on the earth.

    points: n positions. rgb: n colours, from the first three principal components. locations: n, latitude and longitude in
    degrees. explained_percent: of the variance, by principal component. num_tiles: all, of which n are drawn.
    """

    format: Literal["mpmae-embedding-map"] = "mpmae-embedding-map"
    format_version: Literal[1] = 1
    method: Literal["pca", "umap"]
    explained_percent: tuple[Finite, ...]
    checkpoint: str
    step: int | None
    source: str
    num_tiles: int
    points: tuple[tuple[Finite, Finite], ...]
    rgb: tuple[Colour, ...]
    locations: tuple[tuple[Finite, Finite] | None, ...]
    groupings: tuple[Grouping, ...]

    @model_validator(mode="after")
    def _check(self) -> "EmbeddingMap":
        num = len(self.points)
        lengths = {"rgb": len(self.rgb), "locations": len(self.locations)}
        for grouping in self.groupings:
            lengths[f"classes of {grouping.title}"] = len(grouping.classes)
            per_class = {len(grouping.names), len(grouping.colours), len(grouping.counts)}
            if len(per_class) > 1 or any(not UNKNOWN <= k < len(grouping.names) for k in grouping.classes):
                raise ValueError(f"{grouping.title}: classes without a name, a colour or a count")
        wrong = [f"{name} has {length} entries" for name, length in lengths.items() if length != num]
        if wrong:
            raise ValueError(f"there are {num} points, but {', '.join(wrong)}")
        return self

    def save(self, folder: Path) -> None:
        """Write MAP_NAME into the folder. Raises OSError."""
        write_whole(folder / MAP_NAME, self.model_dump_json() + "\n")


def load_map(folder: Path) -> EmbeddingMap | None:
    """The map in a folder of embeddings, None where there is none. Raises ReportError for a file that is something else."""
    path = folder / MAP_NAME
    if not path.exists():
        return None
    try:
        return EmbeddingMap.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        problems = error.errors() if isinstance(error, ValidationError) else []
        told = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems[:3]) or str(error)
        raise ReportError(
            f"{path} is not a map of embeddings ({told}); draw it again with the same mpmae-embed, or move it away"
        ) from error
