"""What evaluations have in common in their configurations: the labelled set, the encoder, the images, the output."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mpmae.config_tree import Float, Int, Section, Text, TextPath


class DatasetSection(Section):
    """The labelled set and how much of it."""

    path: TextPath = Field(Path("data"), description="a GEO-Bench task's folder, an HDF5 file, or a CSV beside GeoTIFFs")
    format: Literal["auto", "geobench", "h5", "geotiff"] = Field("auto", description="auto: told by what lies at path")
    partition: Text = Field("default", description="geobench: NAME_partition.json")
    band_names: Literal["corrected", "published"] = Field(
        "corrected", description="published: as GEO-Bench's files say, also where they are known to be wrong"
    )
    product_level: Literal["auto", "l1c", "l2a", "none"] = Field(
        "auto", description="Sentinel-2 product of the images; auto: what the set says or is known for; none: not known"
    )
    label_fractions: tuple[Annotated[Float, Field(gt=0, le=1)], ...] = Field(
        (1.0,), min_length=1, description="of the training split, stratified by class"
    )
    num_folds: Int | None = Field(
        None, ge=2, description="cross-validation over all samples instead of the set's own splits"
    )


class EncoderSection(Section):
    """The encoder that gives the features."""

    checkpoint: TextPath | None = Field(
        None, description="anything mpmae reads: a run, a checkpoint, an export; None: random"
    )
    name: Text = Field("convnextv2_atto", description="as in `mpmae.create_encoder`, or multimae_*; a checkpoint must agree")
    patch_size: Int | None = Field(None, gt=0, description="None: the checkpoint's, else 8")
    bands_in: tuple[str, ...] | None = Field(None, description="Sentinel-2 bands; None: the checkpoint's, else all but B10")
    domains: tuple[str, ...] | None = Field(
        None, min_length=1, description="MultiMAE: what it reads, such as [rgb, depth]; None: all whose bands the set has"
    )
    pooling: Literal["mean", "global"] = Field(
        "mean", description="MultiMAE: the mean over all tokens with data and the global one, or the global token alone"
    )


class ImageSection(Section):
    """How a stored image becomes the encoder's input."""

    normalise: Literal["auto", "pretraining", "dataset"] = Field(
        "auto", description="statistics; auto: the checkpoint's for the set's product level where both are known"
    )
    size: Int | None = Field(None, gt=0, description="side in pixels that the encoder sees; None: the stored one")
    fit: Literal["resize", "tile", "crop"] = Field(
        "resize", description="what makes an image of another size fit: scaling, windows side by side, or its centre"
    )


class InputsSection(Section):
    """Several inputs of one MultiMAE, evaluated one after the other and compared in one table."""

    subsets: dict[str, tuple[str, ...]] = Field(
        {}, description="name -> domains, the first is what the others are compared with; empty: encoder.domains alone"
    )


class OutputSection(Section):
    """Where results go, and on what they are computed."""

    dir: TextPath = Path("runs/eval")
    device: Text = Field("auto", description="auto, cpu, cuda or cuda:N")
    num_workers: Int = Field(2, ge=0, description="threads that read images")
    seeds: tuple[Annotated[Int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1, description="one whole evaluation each")
