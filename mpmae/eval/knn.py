"""k nearest neighbours on feature vectors.

Shapes: N training images, M images to classify, D features, K classes.

A neighbour's similarity is the cosine; it votes for its classes with weight exp(similarity / 0.07), as in Wu et al.,
"Unsupervised feature learning via non-parametric instance discrimination" (arXiv 1805.01978, section 3.4), and DINO (arXiv
2104.14294), whose protocol evaluations of Earth-observation encoders follow. Where all similarities are close to each other
the vote is nearly a plain majority, whose ties the nearer neighbours decide.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07
_CHUNK_BYTES = 1 << 28


def knn_shares(train: Tensor, classes: Tensor, images: Tensor, k: int, temperature: float = TEMPERATURE) -> Tensor:
    """The weighted share of the k nearest neighbours that have each class: float32 [M, K] in [0, 1].

    train: features [N, D], N at least 1. classes: [N, K], 1 where an image has the class (one per row, or several). images:
    features [M, D]. Exact; of neighbours that are equally near the first in `train` count. Fewer than k are all taken.
    """
    train, images = F.normalize(train.float(), dim=1), F.normalize(images.float(), dim=1)
    classes, k = classes.to(train), min(k, len(train))
    rows = max(1, _CHUNK_BYTES // (8 * len(train)))
    return torch.cat([_shares(chunk @ train.T, classes, k, temperature) for chunk in images.split(rows)])


def _shares(similarity: Tensor, classes: Tensor, k: int, temperature: float) -> Tensor:
    """For similarities [m, N]. `topk` alone would not say which of equal neighbours it takes."""
    last = similarity.topk(k, dim=1).values[:, -1:]
    above, equal = similarity > last, similarity == last
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    weights = torch.exp((similarity - similarity.amax(1, keepdim=True)) / temperature) * chosen
    return (weights @ classes) / weights.sum(1, keepdim=True)
