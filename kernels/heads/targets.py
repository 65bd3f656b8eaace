"""What a head's predictions are compared with, as both implementations take it.

Shapes: N samples, B bands of the image, S its side in pixels, G patches on a side, p patch side in pixels, M hidden patches,
P = p*p pixels of a patch, C channels to predict (bands or classes).
"""

from typing import NamedTuple

from torch import Tensor

NORM_EPS = 1e-6


class Targets(NamedTuple):
    """The images, where to look in them and what counts.

    values: [N, B, S, S], floating-point, or class ids (any integers) with B = 1. valid: bool, the shape of values. bands:
    int64 [C], positions of the bands to predict, or None for all. hidden: int64 [N, M], patch numbers. counted: bool [N].
    num_classes: C for class ids, 0 for floating-point values. normalise: each patch gets mean 0 and variance 1 first.
    """

    values: Tensor
    valid: Tensor
    bands: Tensor | None
    hidden: Tensor
    counted: Tensor
    patch_size: int
    num_classes: int
    normalise: bool

    @property
    def num_channels(self) -> int:
        """C: classes, or bands to predict."""
        return self.num_classes or (self.values.shape[1] if self.bands is None else len(self.bands))

    @property
    def num_values(self) -> int:
        """Target values of a sample's hidden patches: M*P*C, or M*P class ids."""
        channels = 1 if self.num_classes else self.num_channels
        return self.hidden.shape[1] * self.patch_size**2 * channels
