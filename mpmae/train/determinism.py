"""The same bits every time on the same ranks."""

import contextlib
import os
from collections.abc import Iterator

import torch

from mpmae.errors import ConfigError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_CHOICES = (":4096:8", ":16:8")


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use only operations that give the same bits every time (`train.deterministic`); the settings are put back.

    Sums on a CPU depend on the number of threads too: repeat a run with the same OMP_NUM_THREADS (run.json has the number).
    To be entered before CUDA starts, as cuBLAS reads its setting then. An operation without such a form raises RuntimeError
    with its name. Raises ConfigError for a cuBLAS workspace setting that is not deterministic.
    """
    if not wanted:
        yield
        return
    given = os.environ.setdefault(_CUBLAS, _CUBLAS_CHOICES[0])
    if given not in _CUBLAS_CHOICES:
        raise ConfigError(
            f"train.deterministic = true, but {_CUBLAS}={given}; unset it, or set {' or '.join(_CUBLAS_CHOICES)}"
        )
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark, cudnn.deterministic = before[1:]
