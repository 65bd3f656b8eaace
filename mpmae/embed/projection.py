"""Vectors in two dimensions: principal components, or UMAP.

Shapes: n vectors, D features, k components.
"""

import numpy as np
import torch

from mpmae.errors import ConfigError

UMAP_SEED = 0


def principal_components(vectors: np.ndarray, num_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions float64 [n, k] along the principal components of float32 [n, D], and the % of the variance of each [k].

    The sign of a component is such that its largest entry (the first of equals) is positive. Components that there are not
    are 0. Nothing is scaled before.
    """
    values = torch.from_numpy(vectors).double()
    centred = values - values.mean(0) if len(values) else values
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    largest = directions.abs().argmax(0)
    directions = directions * torch.where(directions.gather(0, largest[None])[0] < 0, -1.0, 1.0)
    total = float(variances.sum())
    num = min(num_components, directions.shape[1])
    positions, percent = np.zeros((len(values), num_components)), np.zeros(num_components)
    if total > 0:
        positions[:, :num] = (centred @ directions[:, :num]).numpy()
        percent[:num] = 100 * (variances[:num] / total).numpy()
    return positions, percent


def umap_positions(vectors: np.ndarray) -> np.ndarray:
    """Positions [n, 2] by UMAP with its default settings and a fixed seed. Raises ConfigError: not installed, n < 4."""
    if len(vectors) < 4:
        raise ConfigError(f"--map umap: {len(vectors)} vectors are too few for it; use --map pca")
    try:
        import umap
    except ImportError as error:
        raise ConfigError(f"--map umap: umap-learn is not here ({error}): pip install 'mpmae[umap]'") from None
    num_neighbours = min(15, len(vectors) - 1)
    # Where there are few vectors the spectral start has no solution.
    start = "spectral" if len(vectors) > 2 * num_neighbours else "random"
    fitted = umap.UMAP(n_components=2, n_neighbors=num_neighbours, init=start, random_state=UMAP_SEED, n_jobs=1)
    return np.asarray(fitted.fit_transform(vectors), np.float64)


def as_colours(positions: np.ndarray) -> list[str]:
    """ "#rrggbb" for positions [n, 3]: each axis from its 2nd to its 98th percentile, in six steps."""
    if not len(positions):
        return []
    low, high = np.percentile(positions, [2, 98], axis=0)
    span = np.where(high > low, high - low, 1)
    steps = np.rint(5 * np.clip(np.where(high > low, (positions - low) / span, 0.5), 0, 1)).astype(int) * 51
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in steps.tolist()]
