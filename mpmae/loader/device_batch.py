"""A `Batch` on a device from the stored bytes of its samples: the host's small arrays, then the fused un-filter kernels.

Shapes: N samples, C bands, P tile side, H image side (pixels), L product levels, M members per sample.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mpmae.errors import ConfigError
from mpmae.kernels.unfilter import StoredMaps, classify_maps, normalise_maps
from mpmae.kernels.unfilter.reference import WORD_BYTES
from mpmae.loader.batch import Batch
from mpmae.loader.maps import Views
from mpmae.loader.requests import BatchRequest
from mpmae.loader.tiers import PackedBatch, StagedBatch
from mpmae.loader.transform import Assembler
from mpmae.modalities import MODALITIES
from mpmae.shard_format import Manifest, PixelEntry

_ALIGNMENT = 16


@dataclass(frozen=True)
class SmallArrays:
    """Named host arrays in one buffer, so that they take one copy. places: byte offset, dtype and shape by name."""

    buffer: torch.Tensor
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]]

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray]) -> "SmallArrays":
        """The arrays, copied into one buffer (pinned where there is CUDA)."""
        places, end = {}, 0
        for name, array in arrays.items():
            places[name] = (end, torch.from_numpy(np.empty(0, array.dtype)).dtype, array.shape)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        buffer = torch.empty(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        for name, array in arrays.items():
            start = places[name][0]
            buffer.numpy()[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return cls(buffer, places)

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The arrays as tensors on `device`, after one copy queued on the current stream."""
        moved = self.buffer.to(device, non_blocking=True)
        tensors = {}
        for name, (start, dtype, shape) in self.places.items():
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            tensors[name] = moved[start : start + num_bytes].view(dtype).view(shape)
        return tensors


@dataclass(frozen=True)
class PreparedBatch:
    """All that the host does for a batch: what to build, its staged bytes and its small arrays."""

    request: BatchRequest
    staged: StagedBatch
    small: SmallArrays


class DeviceAssembler:
    """Builds batches on `device`; maps come out as `dtype` (float32, bfloat16, float16), everything else as `Batch` says.

    Raises ConfigError naming every modality whose stored form only the cpu loader reads.
    """

    def __init__(
        self,
        assembler: Assembler,
        manifest: Manifest,
        modalities: tuple[str, ...],
        img_size_px: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._assembler, self._device = assembler, device
        self._img_size_px, self._dtype = img_size_px, dtype
        entries = {entry.name: entry for entry in manifest.pixels}
        self.entries = {name: entries[name] for name in modalities if MODALITIES[name].scope == "pixel"}
        self._continuous = [name for name in self.entries if MODALITIES[name].kind == "continuous"]
        self._position = {name: manifest.members.index(name) for name in self.entries}
        self._check()
        self.stored = {name: _stored_maps(entry) for name, entry in self.entries.items()}
        self._tables = {name: self._tensors(name) for name in self.entries}

    def _check(self) -> None:
        problems = []
        for name, entry in self.entries.items():
            if entry.codec == "zstd":
                problems.append(
                    f"{name} is stored with codec zstd, which has no decoder here; rebuild with codec lz4 or raw"
                )
            if entry.stored_dtype.name not in WORD_BYTES or (entry.quantisation and np.dtype(entry.dtype) != np.float32):
                problems.append(f"{name} is stored as {entry.dtype}, which the kernels do not read")
        if problems:
            raise ConfigError([f"{problem}, or use the cpu loader" for problem in problems])

    def _tensors(self, name: str) -> dict:
        if MODALITIES[name].kind == "categorical":
            return {"table": torch.from_numpy(self._assembler.maps[name].lookup).to(self._device)}
        rule, statistics = self._assembler.no_data[name], self._assembler.statistics[name]
        tensors = {"mean": statistics.mean, "std": statistics.std, "codes": np.array(rule.codes, np.int64)}
        return {key: torch.from_numpy(array).to(self._device) for key, array in tensors.items()} | {
            "non_finite": rule.non_finite
        }

    def prepare(self, request: BatchRequest, views: Views, staged: StagedBatch) -> PreparedBatch:
        """The host's part: small arrays of the batch in one buffer."""
        ids = np.asarray(request.sample_ids, np.int64)
        arrays = {
            "views": views.table().astype(np.int32),
            "padding": np.zeros(len(ids), bool) if request.padding is None else request.padding,
        }
        levels = self._assembler.levels(ids, staged.scalars)
        arrays |= {f"level.{name}": levels[name].astype(np.int32) for name in self._continuous}
        for name, entry in self.entries.items():
            if entry.codec == "raw":
                arrays[f"offsets.{name}"] = staged.offsets[:, self._position[name]]
        values, valid = self._assembler.tiles(ids, staged.scalars)
        arrays |= {f"values.{name}": tensor.numpy() for name, tensor in values.items()}
        arrays |= {f"valid.{name}": tensor.numpy() for name, tensor in valid.items()}
        return PreparedBatch(request, staged, SmallArrays.of(arrays))

    def check_on_the_host(self, sample_ids: np.ndarray) -> None:
        """Decode the samples int64 [N] as the cpu loader does; ShardError naming shard and sample of one that is corrupt."""
        self._assembler.raw_batch(sample_ids)

    def chunks(self, packed: PackedBatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Offset and size int32 [N] of each LZ4 member in the packed buffer, by modality; what inflation needs."""
        return {
            name: (
                packed.offsets[:, self._position[name]].astype(np.int32),
                packed.sizes[:, self._position[name]].astype(np.int32),
            )
            for name, entry in self.entries.items()
            if entry.codec == "lz4"
        }

    def batch(self, prepared: PreparedBatch, packed: PackedBatch, inflated: dict[str, torch.Tensor]) -> Batch:
        """The batch; kernels are queued on the current stream. inflated: uint8 [N, bytes] by modality of codec lz4.

        The sample ids stay on the host, where the visible patches are drawn from them: fetching them would wait for the GPU.
        """
        small = prepared.small.on(self._device)
        values, valid = {}, {}
        for name, entry in self.entries.items():
            stored, tables = self.stored[name], self._tables[name]
            if entry.codec == "raw":
                data, offsets = packed.data, small[f"offsets.{name}"]
            else:
                data = inflated[name].view(-1)
                offsets = torch.arange(len(inflated[name]), device=self._device) * stored.num_bytes
            common = (data, offsets, small["views"], stored)
            if name in self._continuous:
                values[name], valid[name] = normalise_maps(
                    *common, level=small[f"level.{name}"], out_side=self._img_size_px, dtype=self._dtype, **tables
                )
            else:
                values[name], valid[name] = classify_maps(*common, out_side=self._img_size_px, **tables)
        for key, tensor in small.items():
            kind, _, name = key.partition(".")
            if kind in ("values", "valid"):
                (values if kind == "values" else valid)[name] = tensor
        request = prepared.request
        ids = torch.from_numpy(np.array(request.sample_ids, np.int64))
        return Batch(values, valid, ids, request.num_present, request.global_batch_size, small["padding"])


def _stored_maps(entry: PixelEntry) -> StoredMaps:
    bands, side, _ = entry.shape
    step = entry.quantisation.step if entry.quantisation else None
    return StoredMaps(entry.stored_dtype.name, bands, side, entry.filter == "delta-planes", step)
