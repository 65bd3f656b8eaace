"""What segmentation adds to the configuration of a fine-tuning."""

from typing import Literal

from pydantic import Field

from mpmae.config_tree import Float, Int, Section


class SegmentationSection(Section):
    """How label maps are predicted. The defaults are those of MMEarth's code: 50 of 200 epochs with a frozen encoder."""

    method: Literal["unet", "convnext", "linear"] | None = Field(
        None,
        description="unet: for a ConvNeXt V2; convnext: ConvNeXt blocks on a MultiMAE's tokens; None: the one of these two "
        "that fits the encoder; linear: a 1x1 convolution on the maps of an encoder that stays as it is",
    )
    frozen_fraction: Float = Field(
        0.25, ge=0, lt=1, description="unet, convnext: of the epochs, at their begin, in which only the decoder trains"
    )
    stages: tuple[Int, ...] = Field((0, 1, 2, 3), min_length=1, description="linear: those whose maps are read")
    num_pictures: Int = Field(8, ge=0, description="test images drawn with label, prediction and error")
