"""Feature vectors of a whole labelled set, computed once and kept on disk.

Shapes: N images of the set, B stored bands, H x W pixels, T windows of an image, C input channels, S image side, D features.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mpmae.errors import DatasetError
from mpmae.eval.dataset import LabelledSet
from mpmae.eval.progress import progress
from mpmae.eval.windows import MAX_WINDOWS, window_means
from mpmae.files import write_whole
from mpmae.in_order import in_order

FORMAT_VERSION = 1
_NUM_HASHED_IMAGES = 16
_LOG = logging.getLogger(__name__)


class Featuriser(Protocol):
    """An encoder or a baseline: prepared images in, feature vectors out. See `mpmae.eval.encoders.ImageEncoder`.

    label: what it is, for tables.
    """

    label: str

    def __call__(self, image: Tensor) -> Tensor:
        """Feature vectors [n, D] for prepared images [n, C, S, S]."""
        ...

    def fingerprint(self) -> str:
        """A hash of all that its features depend on but the images."""
        ...


Prepare = Callable[[np.ndarray], Tensor]  # the windows [T, C, S, S] of a stored image [B, H, W]; from several threads


@dataclass(frozen=True)
class Source:
    """A featuriser with the preparation of its input, such as `mpmae.eval.prepare.Preparation`.

    about: what the preparation depends on beside the set and the featuriser, as plain values; part of the key under which
    features are kept.
    """

    featuriser: Featuriser
    prepare: Prepare
    about: Mapping[str, Any] = field(default_factory=dict)

    def key(self, identity: str) -> str:
        """What tells its features of a set from any others. identity: of `set_identity`."""
        parts = (FORMAT_VERSION, self.featuriser.fingerprint(), sorted(self.about.items()), identity)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def image_features(
    source: Source,
    labelled: LabelledSet,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 2,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Feature vectors [N, D] float32 on the CPU of the images at `indices` (None: all), the mean over an image's windows.

    num_workers: threads that read and prepare; 0 does it in this one. Raises DatasetError for an image that cannot be read,
    or whose features are not finite.
    """
    indices = range(len(labelled)) if indices is None else indices
    featuriser = source.featuriser
    if isinstance(featuriser, nn.Module):
        featuriser = featuriser.eval().to(device)

    def read(index: int) -> Tensor:
        return source.prepare(labelled.image(int(index)))

    vectors: list[Tensor] = []  # of a batch each
    with closing(_read_all(read, indices, num_workers)) as images:
        shown = progress(images, f"features of {featuriser.label}", len(indices))
        for group in _groups(shown):
            vectors.append(window_means(featuriser, group, device))
    features = torch.cat(vectors)
    broken = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        names = ", ".join(labelled.sample_id(int(indices[at])) for at in broken[:5])
        raise DatasetError(
            f"{len(broken)} of {len(features)} images have features of {featuriser.label} that are not finite ({names}); "
            "look at their pixels, and at whether the checkpoint's training diverged"
        )
    return features


def kept_features(
    folder: Path,
    source: Source,
    labelled: LabelledSet,
    identity: str,
    *,
    device: torch.device | str = "cpu",
    num_workers: int = 2,
) -> Tensor:
    """As `image_features` of all images, read from `folder` where it has them, else computed and written there.

    identity: of `set_identity`. A file that cannot be read is computed again, with a warning.
    """
    key, label = source.key(identity), source.featuriser.label
    path = folder / f"{key[:32]}.safetensors"
    if path.exists():
        try:
            kept = load_file(path)["features"]
            if len(kept) == len(labelled):
                return kept
            problem = f"{len(kept)} rows for {len(labelled)} images"
        except (SafetensorError, OSError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
        _LOG.warning("%s holds no features of this set (%s); they are computed again", path, problem)
    features = image_features(source, labelled, device=device, num_workers=num_workers)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"key": key, "label": label, "task": labelled.task.name, "about": repr(dict(source.about))}
    write_whole(path, save({"features": features}, metadata=facts))
    return features


def set_identity(labelled: LabelledSet) -> str:
    """A hash of the task, all sample ids and the pixels of some images spread over the set.

    Not of all pixels: reading them is most of the time that kept features save.
    """
    digest = hashlib.sha256(repr(labelled.task).encode())
    for index in range(len(labelled)):
        digest.update(labelled.sample_id(index).encode() + b"\0")
    for index in np.unique(np.linspace(0, len(labelled) - 1, _NUM_HASHED_IMAGES).round().astype(int)):
        digest.update(np.ascontiguousarray(labelled.image(int(index))).tobytes())
    return digest.hexdigest()


def _read_all(read: Callable[[int], Tensor], indices: Sequence[int], num_workers: int) -> Iterator[Tensor]:
    if num_workers:
        yield from in_order(read, indices, num_workers, depth=2 * MAX_WINDOWS)
    else:
        yield from map(read, indices)


def _groups(images: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    """Images in their order, in batches of equal sizes."""
    group: list[Tensor] = []
    for windows in images:
        num = sum(len(others) for others in group)
        if group and (windows.shape[1:] != group[0].shape[1:] or num + len(windows) > MAX_WINDOWS):
            yield group
            group = []
        group.append(windows)
    if group:
        yield group
