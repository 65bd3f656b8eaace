"""Joining the partitions of a DeepSpeed checkpoint of ZeRO stage 1, 2 or 3; DeepSpeed itself is not needed.

Source of the layouts: the files of DeepSpeed 0.19.8. At stages 1 and 2 every rank says which piece of which weight lies
where in its flat partition of a parameter group. At stage 3 every weight is cut into equal pieces, one a rank, which lie one
after the other in the rank's flat sub-groups.
"""

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from mpmae.errors import CheckpointError
from mpmae.models.interop.pickles import load_pickle

_WEIGHT = "weight"
_MALFORMED = (KeyError, IndexError, TypeError, RuntimeError, AttributeError, ValueError)


def rank_of(path: Path) -> int:
    """The rank that wrote a file of a ZeRO checkpoint."""
    match = re.search(r"pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else 0


def optimizer_files(folder: Path) -> list[Path]:
    """The files with the partitions, by rank; none at stage 0."""
    return sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=rank_of)


class ZeroPartitions:
    """Weights and AdamW moments of a ZeRO folder: float32 and whole, one name at a time.

    shapes: whole shape of each weight that trains, by name. With `mapped` the files are mapped into memory, and only what is
    asked for is read. Raises CheckpointError: files absent, damaged, or not of one checkpoint.
    """

    def __init__(self, folder: Path, param_shapes: list[dict], *, mapped: bool = False):
        self.folder = folder
        paths = optimizer_files(folder)
        ranks = [rank_of(path) for path in paths]
        if ranks != list(range(len(ranks))):
            raise CheckpointError(
                f"{folder}: files *_optim_states.pt of ranks {ranks}, expected 0 to {len(ranks) - 1}, each once"
            )
        loaded = [load_pickle(path, mapped=mapped) for path in paths]
        try:
            self._partitions = [content["optimizer_state_dict"] for content in loaded]
            self._check_complete()
            self.shapes = {n: torch.Size(shape) for group in param_shapes for n, shape in group.items()}
            self._is_stage_3 = "fp32_flat_groups" in self._partitions[0]
            self._places: dict[str, tuple[int, int]] = {}  # of a name: its group; at stage 3, where its piece starts
            for group, shapes in enumerate(param_shapes):
                start = 0
                for name, shape in shapes.items():
                    self._places[name] = (group, start)
                    start += math.ceil(math.prod(shape) / len(loaded))
        except _MALFORMED as error:
            raise self._do_not_fit(error) from error

    def read(self, name: str, part: str = _WEIGHT) -> Tensor:
        """A weight, or a moment of it (`part` exp_avg or exp_avg_sq; 0 before the first update)."""
        shape = self.shapes[name]
        try:
            pieces = self._pieces(name, part)
            return torch.cat(pieces)[: shape.numel()].view(shape) if pieces else torch.zeros(shape)
        except _MALFORMED as error:
            raise self._do_not_fit(f"{part} of {name}: {error}") from error

    def num_updates(self) -> int:
        """The step count of AdamW."""
        try:
            counts = {int(state["step"]) for p in self._partitions for state in self._states(p) if "step" in state}
        except _MALFORMED as error:
            raise self._do_not_fit(error) from error
        if len(counts) > 1:
            raise self._do_not_fit(f"AdamW has made {sorted(counts)} updates, which should be one number")
        return counts.pop() if counts else 0

    def _pieces(self, name: str, part: str) -> list[Tensor]:
        group, start = self._places[name]
        pieces = []
        for partition in self._partitions:
            if self._is_stage_3:
                length = math.ceil(self.shapes[name].numel() / len(self._partitions))
            else:
                place = partition["param_slice_mappings"][group].get(name)
                if place is None:
                    continue
                start, length = place.start, place.numel
            flat = self._flat(partition, group, part)
            if flat is None:
                return []
            pieces.append(flat.narrow(0, start, length))
        if not pieces:
            raise ValueError("no rank has a piece")
        return pieces

    def _flat(self, partition: dict, group: int, part: str) -> Tensor | None:
        """A rank's flat partition; None for moments that are not there yet."""
        if part == _WEIGHT:
            return partition["fp32_flat_groups" if self._is_stage_3 else "single_partition_of_fp32_groups"][group]
        states = self._states(partition)
        return states[group][part] if states else None

    def _states(self, partition: dict) -> list[dict]:
        """AdamW's state of each flat group, in order."""
        base = partition["optimizer_state_dict" if self._is_stage_3 else "base_optimizer_state"]
        if isinstance(base, list):  # an "elastic" checkpoint
            return base
        return [base["state"][index] for index in sorted(base["state"])]

    def _check_complete(self) -> None:
        count = self._partitions[0]["partition_count"]
        expected = max(count) if isinstance(count, (list, tuple)) else int(count)
        if len(self._partitions) != expected:
            raise CheckpointError(
                f"{self.folder}: {len(self._partitions)} files *_optim_states.pt, expected {expected}; copy the whole folder"
            )

    def _do_not_fit(self, reason: object) -> CheckpointError:
        return CheckpointError(f"{self.folder}: the ZeRO partitions do not fit each other: {reason}")
