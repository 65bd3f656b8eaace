"""Class maps as sets store them, in their product's codes, as class ids.

Shapes: H x W pixels.
"""

import numpy as np

from mpmae.errors import DatasetError
from mpmae.modalities import class_lookup, no_data_rule, spec_of

_CODES = 256


class ClassCodes:
    """From codes of a land-cover product (ESA WorldCover: 10, 20, ...) to class ids 0, 1, ...

    modality: of the map. where: the set, for messages.
    """

    def __init__(self, modality: str, where: str):
        self._modality, self._where = modality, where
        self._lookup = class_lookup(spec_of(modality))
        codes = [land_class.code for land_class in spec_of(modality).classes]
        self._known = np.zeros(_CODES, bool)
        self._known[[*codes, *no_data_rule(modality, np.uint8).codes]] = True
        self._told = ", ".join(map(str, codes))

    def ids(self, stored: np.ndarray) -> np.ndarray:
        """float32 [H, W]: class ids, NaN where there is no data, of codes [H, W]. Raises DatasetError for unknown codes."""
        there = np.isfinite(stored)
        codes = np.where(there, stored, 0)
        whole = np.clip(codes, 0, _CODES - 1).astype(np.int64)
        wrong = np.unique(codes[there & ((whole != codes) | ~self._known[whole])])
        if wrong.size:
            raise DatasetError(
                f"{self._where}: {self._modality} holds {', '.join(f'{v:g}' for v in wrong[:5])}; expected its codes "
                f"{self._told}, and 0 or NaN where there is no data"
            )
        ids = self._lookup[whole].astype(np.float32)
        return np.where(there & (ids >= 0), ids, np.float32(np.nan))
