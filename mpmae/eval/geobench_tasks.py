"""What is known of the twelve tasks of GEO-Bench v1 beyond what their files say, or say wrongly.

Sources: the converters in ServiceNow/geo-bench (`make_benchmark/dataset_converters`), its issues 28 and 29, and
MMEarth-train's `geobenchdataset.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedTask:
    """One published task.

    metric: decides, as in GEO-Bench. product_level, scale: see `mpmae.eval.dataset.Task`. class_names: for sets whose files
    name none. true_bands: published band name -> the band that is stored under it, where the two differ; None for one that
    is no band of the sensor. is_located: whether a sample's transform is its own; else it is that of the scene it was cut
    from, or the same for all.
    """

    kind: str
    metric: str = ""
    product_level: str | None = None
    scale: float = 1.0
    class_names: tuple[str, ...] = ()
    true_bands: Mapping[str, str] = field(default_factory=dict)
    is_located: bool = True


# Issue 28: EuroSAT stores B8A last, the converter named the channels as if it came ninth.
_EUROSAT = {
    "08A - Vegetation Red Edge": "B9",
    "09 - Water vapour": "B10",
    "10 - SWIR - Cirrus": "B11",
    "11 - SWIR": "B12",
    "12 - SWIR": "B8A",
}
# Issue 29: the source has no B6, B9 and B10, swaps B8A and B8, and ends with 8-bit colours
# (mliu356/kiln-scaling, `earth_engine_get_composite.ipynb`: means of COPERNICUS/S2_SR, which is L2A).
_BRICK_KILN = {
    "06 - Vegetation Red Edge": "B7",
    "07 - Vegetation Red Edge": "B8A",
    "08 - NIR": "B8",
    "08A - Vegetation Red Edge": "B11",
    "09 - Water vapour": "B12",
    "10 - SWIR - Cirrus": "TCI_R",
    "11 - SWIR": "TCI_G",
    "12 - SWIR": "TCI_B",
}
_CASHEW_CLASSES = (
    "no data",
    "well-managed plantation",
    "poorly-managed plantation",
    "non-plantation",
    "residential",
    "background",
    "uncertain",
)
_CROP_CLASSES = (
    "No Data",
    "Lucerne/Medics",
    "Planted pastures (perennial)",
    "Fallow",
    "Wine grapes",
    "Weeds",
    "Small grain grazing",
    "Wheat",
    "Canola",
    "Rooibos",
)

CLASSIFICATION, SEGMENTATION = "classification_v1.0", "segmentation_v1.0"
TASKS: dict[str, PublishedTask] = {
    "m-bigearthnet": PublishedTask("multilabel", "f1_micro", "l2a"),
    "m-brick-kiln": PublishedTask("multiclass", "accuracy", "l2a", true_bands=_BRICK_KILN),
    "m-eurosat": PublishedTask("multiclass", "accuracy", "l1c", true_bands=_EUROSAT),
    "m-forestnet": PublishedTask("multiclass", "accuracy"),
    "m-pv4ger": PublishedTask("multiclass", "accuracy"),
    # Reflectance 0..1. No file says the product: its mean falls from blue (0.130) over green (0.117) to red (0.114), as
    # EuroSAT's does; in L2A sets it rises.
    "m-so2sat": PublishedTask("multiclass", "accuracy", "l1c", scale=10_000.0),
    # No file says the product: B9 (2,853) is no darker than B8A (2,644), so its water vapour is corrected for.
    "m-cashew-plant": PublishedTask("segmentation", "miou", "l2a", class_names=_CASHEW_CLASSES, is_located=False),
    "m-chesapeake": PublishedTask("segmentation", "miou"),
    "m-NeonTree": PublishedTask("segmentation", "miou", is_located=False),
    # Its transform takes metres for degrees; the centre is right all the same.
    "m-nz-cattle": PublishedTask("segmentation", "miou"),
    "m-pv4ger-seg": PublishedTask("segmentation", "miou"),
    # L2A, but stretched to 8 bits (means of 13 to 84): no reflectance that pretraining statistics would fit.
    "m-SA-crop-type": PublishedTask("segmentation", "miou", class_names=_CROP_CLASSES, is_located=False),
}


def names_are_wrong(name: str, stats: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether the statistics of a task with `true_bands` show that its band names are the wrong ones.

    m-eurosat: a mean of about 12 under "09" is cirrus, water vapour has hundreds. m-brick-kiln: nothing above 255 under "12"
    is an 8-bit colour. A corrected release fails this, and its names are then taken as they are.
    """
    if name == "m-eurosat":
        return _value(stats, "09 - Water vapour", "mean") < 0.1 * _value(stats, "10 - SWIR - Cirrus", "mean")
    return name == "m-brick-kiln" and _value(stats, "12 - SWIR", "max") <= 255


def _value(stats: Mapping[str, Mapping[str, float]], band: str, key: str) -> float:
    return float(stats.get(band, {}).get(key, math.inf))
