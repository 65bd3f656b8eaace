"""The configuration of a fine-tuning: `launch/finetune.py`'s keys."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from mpmae.config_tree import Beta, Float, Int, Section, load_tree
from mpmae.eval.config import DatasetSection, EncoderSection, ImageSection, InputsSection, OutputSection
from mpmae.eval.segmentation_config import SegmentationSection


class FinetuneSection(Section):
    """How a model is trained on a labelled set, whatever its kind of task. The defaults are those of MMEarth's code."""

    epochs: Int = Field(100, gt=0)
    batch_size: Int = Field(64, gt=0, description="samples of an optimizer step, of all ranks together")
    micro_batch_size: Int | None = Field(
        None, gt=0, description="at most so many samples at once on a rank; None: its whole share"
    )
    blr: Float = Field(5e-4, gt=0, description="rate after the warm-up for a batch of 256; grows with batch_size")
    lr: Float | None = Field(None, gt=0, description="the rate itself, instead of blr")
    min_lr: Float = Field(1e-6, ge=0, description="at the end of the cosine")
    warmup_epochs: Float = Field(20, ge=0)
    weight_decay: Float = Field(0.05, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    layer_decay: Float = Field(1.0, gt=0, le=1, description="factor of the rate from a layer to the one before it")
    clip_grad_norm: Float | None = Field(None, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    drop_path: Float = Field(0.0, ge=0, lt=1, description="chance to skip the last block; grows linearly from the first")
    head_init_scale: Float = Field(0.001, ge=0, description="factor on the new classifier's random weights")
    freeze: bool = Field(False, description="train the classifier alone: the linear probe of MMEarth's code")
    reference_quirks: bool = Field(False, description="layer decay by the depths that MMEarth's code computes")
    patience_epochs: Int | None = Field(
        None, gt=0, description="stop after so many epochs without a better validation; None: never"
    )
    baselines: tuple[Literal["random_init", "image_statistics", "random_convolutions"], ...] = Field(
        ("random_init", "image_statistics", "random_convolutions"),
        description="beside it: the same architecture from scratch, and linear probes of features that nobody trained",
    )
    save_interval_s: Float = Field(60.0, ge=0, description="an interrupted run can lose so much time")
    keep_weights: bool = Field(True, description="of the best epoch of each run, as model.safetensors")
    cache_bytes: Int = Field(2 << 30, ge=0, description="memory of a rank for images that are read and prepared")


class AugmentSection(Section):
    """Random changes of training images, and how sure the targets are."""

    flip: bool = Field(True, description="left to right and top to bottom, each half of the time")
    rotate: bool = Field(True, description="by a multiple of 90 degrees")
    crop_min_area: Float | None = Field(
        None, gt=0, le=1, description="random resized crop: least fraction of the image; None: no crop"
    )
    erase_probability: Float = Field(0.0, ge=0, le=1, description="of a rectangle of noise in an image")
    mixup_alpha: Float = Field(0.0, ge=0, description="0: no mixup")
    cutmix_alpha: Float = Field(0.0, ge=0, description="0: no CutMix")
    mix_probability: Float = Field(1.0, ge=0, le=1, description="that a batch is mixed, where mixup or CutMix is on")
    smoothing: Float = Field(0.1, ge=0, lt=1, description="label smoothing")


class FinetuneConfig(Section):
    """The whole tree."""

    output: OutputSection = OutputSection(dir=Path("runs/finetune"))
    dataset: DatasetSection = DatasetSection()
    encoder: EncoderSection = EncoderSection()
    image: ImageSection = ImageSection()
    inputs: InputsSection = InputsSection()
    finetune: FinetuneSection = FinetuneSection()
    augment: AugmentSection = AugmentSection()
    segmentation: SegmentationSection = SegmentationSection()


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Defaults < YAML file < `key=value`. Raises ConfigError with every problem at once."""
    return load_tree(FinetuneConfig, path, overrides)
