"""The DALI loader: the batches of `CpuLoader`, on the GPU (`device_id`) or, to be testable without one, on the CPU.

On the GPU:

    threads   store.spans -> one pinned buffer of stored bytes, scalars decoded       (DeviceTier.stage)
    driver    one copy, or a gather from the device tier -> DALI inflates all LZ4 members -> fused kernels -> Batch
    caller    waits for the batch's event on its own stream, on the GPU; the host does not wait

The driver is a thread with its own CUDA stream; it works `prefetch` batches ahead. One DALI sample holds a whole modality of
a batch: `decoders.inflate` takes the packed buffer with each member's offset and size and gives uint8 [N, bytes], which the
kernels read where it lies (DLPack). Members of codec raw are read where they lie in the packed buffer. After inflation
nothing passes through the host.

Lifetimes: DALI's outputs are bound to the driver's stream and stay referenced until the event after the kernels that read
them has passed. PyTorch's memory is allocated on the driver's stream, and handed over with `record_stream`. Pinned buffers
go back to PyTorch's cache, which waits for their copies.

Of corrupt LZ4 blocks, inflation refuses those that would give more bytes than the member has (`check_output_size`, for which
the driver waits for the GPU); the host then decodes the batch to name the sample. `decoders.inflate` has no status output: a
block that gives as many bytes or fewer is not noticed, and the rest of its map is whatever was in memory.

Without a GPU, DALI crops, flips, casts, masks and normalises host arrays; DALI has no inflation on the CPU, so LZ4 is undone
by `mpmae.shard_codecs`. A pipeline runs as a function of its inputs (`prefetch_queue_depth=1`): all prefetching is the
driver's, and there is no state to checkpoint.

Shapes: N samples, C bands, P tile side, H image side (pixels).
"""

import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch

from mpmae.errors import ConfigError
from mpmae.in_order import in_order
from mpmae.loader.batch import Batch
from mpmae.loader.device_batch import DeviceAssembler, PreparedBatch
from mpmae.loader.maps import Views
from mpmae.loader.order import BatchPlan, TrainOrder
from mpmae.loader.read import ShardReader
from mpmae.loader.requests import BatchRequest, evaluation_requests, training_requests
from mpmae.loader.tiers import DeviceTier, PackedBatch
from mpmae.loader.transform import Assembler, Augmentation, draw_views
from mpmae.modalities import MODALITIES
from mpmae.shard_format import PixelEntry

try:
    from nvidia.dali import Pipeline, fn, types
except ImportError as error:
    raise ConfigError(
        f"the DALI loader needs NVIDIA DALI ({error}); `pip install mpmae[dali]` or use the cpu loader"
    ) from error

_LOG = logging.getLogger(__name__)
MAX_PACKED_BYTES = 2**31 - 1  # DALI takes chunk offsets as int32
MAX_IN_FLIGHT = 2  # batches whose GPU work may be queued at a time: the copy of one overlaps with the kernels of another
_CPU_TYPES = {
    "uint8": types.UINT8,
    "int8": types.INT8,
    "uint16": types.UINT16,
    "int16": types.INT16,
    "uint32": types.UINT32,
    "int32": types.INT32,
    "float32": types.FLOAT,
}


class DaliLoader:
    """Batches of one split for one rank, as `CpuLoader` gives them: same order, draws and content.

    reader: a `ShardReader`, or a `HostTier` on top of one. device_id: the GPU that makes the batches and holds them; None:
    the CPU. device_budget_bytes: GPU memory for a `DeviceTier`. dtype: of continuous maps.
    Raises ConfigError for a device that is not there, or a set that only the cpu loader reads.
    """

    def __init__(
        self,
        reader: ShardReader,
        modalities: tuple[str, ...],
        img_size_px: int,
        *,
        seed: int,
        augmentation: Augmentation | None = None,
        num_workers: int = 2,
        prefetch: int = 4,
        reference_quirks: bool = False,
        device_id: int | None = None,
        device_budget_bytes: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        self.reader, self.modalities = reader, tuple(modalities)
        self._augmentation, self._seed = augmentation or Augmentation(), seed
        self._img_size_px, self._num_workers, self._prefetch = img_size_px, num_workers, prefetch
        assembler = Assembler(reader, self.modalities, img_size_px, reference_quirks)
        if device_id is not None:
            _check_device(device_id)
            device = torch.device("cuda", device_id)
            on_device = DeviceAssembler(assembler, reader.manifest, self.modalities, img_size_px, device, dtype)
            tier = DeviceTier(reader, device_budget_bytes, device)
            if device_budget_bytes and tier.report.num_kept < tier.report.num_samples:
                _LOG.warning("%s", tier.report)
            self._prefetch_shards = tier.prefetch
            self._maker = partial(_GpuMaker, on_device, tier, torch.cuda.Stream(device))
        else:
            if device_budget_bytes:
                raise ConfigError(
                    f"device_budget_bytes = {device_budget_bytes} needs a GPU; leave it out with device_id = None"
                )
            self._prefetch_shards = reader.prefetch
            entries = {entry.name: entry for entry in reader.manifest.pixels if entry.name in self.modalities}
            self._maker = partial(_CpuMaker, assembler, entries, img_size_px, dtype, num_workers)

    def training(self, order: TrainOrder, plan: BatchPlan, rank: int, start_step: int) -> Iterator[tuple[int, Batch]]:
        """(epoch, micro batch) from step `start_step` on, `plan.num_micro_steps` per step, without end."""
        place = (rank, start_step, self._prefetch_shards)
        return self._run(training_requests(self.reader, self.modalities, order, plan, *place))

    def evaluation(
        self, batch_size: int, rank: int, world_size: int, max_samples: int | None = None
    ) -> Iterator[tuple[int, Batch]]:
        """(0, batch) over the split once; counts as in `CpuLoader.evaluation`."""
        return self._run(evaluation_requests(self.reader, self.modalities, batch_size, rank, world_size, max_samples))

    def batch_of(self, sample_ids: np.ndarray) -> Batch:
        """The given samples (int64 [N]) as one batch by themselves, with the views of epoch 0."""
        num_present = self.reader.num_present(sample_ids, self.modalities)
        ((_, batch),) = self._run([BatchRequest(0, sample_ids, num_present, len(sample_ids))])
        return batch

    def _run(self, requests: Iterable[BatchRequest]) -> Iterator[tuple[int, Batch]]:
        maker = self._maker()

        def prepare(request: BatchRequest) -> tuple[int, object]:
            ids, tile_size_px = request.sample_ids, self.reader.manifest.tile_size_px
            views = draw_views(self._augmentation, self._seed, request.epoch, ids, tile_size_px, self._img_size_px)
            return request.epoch, maker.prepare(request, views)

        def make_next(_: None) -> tuple[int, object] | None:
            item = next(prepared, None)
            return item and (item[0], maker.make(item[1]))

        prepared = in_order(prepare, requests, self._num_workers, self._prefetch)
        made = in_order(make_next, itertools.repeat(None), 1, self._prefetch)
        try:
            while (item := next(made)) is not None:
                yield item[0], maker.hand_over(item[1])
        finally:  # the driver first: it reads from the others
            made.close()
            prepared.close()
            maker.close()


def _check_device(device_id: int) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= device_id < count:
        raise ConfigError(f"device_id = {device_id}, but PyTorch sees {count} CUDA devices; use None for the CPU pipeline")


def inflate_pipeline(device_id: int, num_bytes: dict[str, int]) -> Pipeline:
    """The pipeline that inflates whole modalities: per name of `num_bytes` (bytes of a member) uint8 [1, N, bytes].

    Inputs: `packed` uint8 [1, bytes] on the GPU; per modality `offsets_NAME` and `sizes_NAME`, int32 [1, N], on the host.
    """
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1, exec_dynamic=True)
    with pipeline:
        packed = fn.external_source(name="packed", device="gpu", ndim=1, dtype=types.UINT8)
        outputs = []
        for name, size in num_bytes.items():
            places = {
                f"chunk_{what}": fn.external_source(name=f"{what}_{name}", ndim=1, dtype=types.INT32)
                for what in ("offsets", "sizes")
            }
            # Unchecked, a corrupt block that gives more than its member holds could be written past its end.
            checked = {"algorithm": "LZ4", "check_output_size": True}
            outputs.append(fn.decoders.inflate(packed, shape=[size], **checked, **places))
        pipeline.set_outputs(*outputs)
    return pipeline


class _GpuMaker:
    """Batches of one run of the loader on the GPU. All of its GPU work is queued on `stream`."""

    def __init__(self, assembler: DeviceAssembler, tier: DeviceTier, stream: torch.cuda.Stream):
        self._assembler, self._tier, self._stream = assembler, tier, stream
        self._inflated_bytes = {
            name: assembler.stored[name].num_bytes for name, entry in assembler.entries.items() if entry.codec == "lz4"
        }
        self._pipeline = inflate_pipeline(stream.device.index, self._inflated_bytes) if self._inflated_bytes else None
        self._held: deque[tuple] = deque()

    def prepare(self, request: BatchRequest, views: Views) -> PreparedBatch:
        """The host's part; ConfigError for a batch that DALI's 32-bit offsets cannot address."""
        staged = self._tier.stage(request.sample_ids)
        if self._pipeline and staged.num_bytes > MAX_PACKED_BYTES:
            raise ConfigError(
                f"a micro batch of {len(request.sample_ids)} samples has {staged.num_bytes} stored bytes, inflation on the "
                f"GPU takes at most {MAX_PACKED_BYTES}; lower train.micro_batch_size"
            )
        return self._assembler.prepare(request, views, staged)

    def make(self, prepared: PreparedBatch) -> tuple[Batch, torch.cuda.Event]:
        """The batch, its work queued, and the event after that work."""
        with torch.cuda.stream(self._stream):
            self._let_go(keep=MAX_IN_FLIGHT - 1)
            packed = self._tier.place(prepared.staged)
            outputs = self._inflate(prepared.request, packed)
            inflated = {name: torch.from_dlpack(out.as_tensor())[0] for name, out in outputs.items()}
            batch = self._assembler.batch(prepared, packed, inflated)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._held.append((outputs, inflated, event))
        return batch, event

    def _inflate(self, request: BatchRequest, packed: PackedBatch) -> dict:
        if self._pipeline is None:
            return {}
        inputs = {"packed": packed.data[None]}
        for name, (offsets, sizes) in self._assembler.chunks(packed).items():
            inputs |= {f"offsets_{name}": offsets[None], f"sizes_{name}": sizes[None]}
        try:
            outputs = self._pipeline.run(self._stream, **inputs)
        except (RuntimeError, ValueError):
            self._assembler.check_on_the_host(request.sample_ids)  # a ShardError, if the samples are to blame
            raise
        return dict(zip(self._inflated_bytes, outputs, strict=True))

    def hand_over(self, made: tuple[Batch, torch.cuda.Event]) -> Batch:
        """The batch for the caller's current stream, which waits for it on the GPU."""
        batch, event = made
        stream = torch.cuda.current_stream(self._stream.device)
        stream.wait_event(event)
        for tensor in (*batch.values.values(), *batch.valid.values(), batch.padding):
            tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        """Let go of DALI's outputs, once the kernels that read them have ended."""
        self._let_go(keep=0)

    def _let_go(self, keep: int) -> None:
        while len(self._held) > keep:
            self._held.popleft()[-1].synchronize()


class _CpuMaker:
    """Batches of one run of the loader on the CPU."""

    def __init__(
        self,
        assembler: Assembler,
        entries: dict[str, PixelEntry],
        img_size_px: int,
        dtype: torch.dtype,
        num_threads: int,
    ):
        unknown = [f"{name} ({e.dtype})" for name, e in entries.items() if np.dtype(e.dtype).name not in _CPU_TYPES]
        if unknown:
            raise ConfigError(f"DALI's CPU pipeline does not read {', '.join(unknown)}; use the cpu loader")
        self._assembler, self._entries = assembler, entries
        self._img_size_px, self._dtype, self._num_threads = img_size_px, dtype, num_threads
        self._continuous = [name for name in entries if MODALITIES[name].kind == "continuous"]
        self._pipeline: Pipeline | None = None

    def prepare(self, request: BatchRequest, views: Views) -> tuple[BatchRequest, np.ndarray, dict[str, np.ndarray]]:
        """The request, its scalars and the pipeline's inputs."""
        raw = self._assembler.raw_batch(request.sample_ids)
        levels = self._assembler.levels(request.sample_ids, raw.records)
        inputs = dict(raw.pixels)
        inputs["start"] = np.stack([views.top, views.left], axis=1).astype(np.int32)
        inputs["hflip"], inputs["vflip"] = views.hflip.astype(np.int32), views.vflip.astype(np.int32)
        for name in self._continuous:
            statistics = self._assembler.statistics[name]
            inputs[f"mean_{name}"] = statistics.mean[levels[name]][:, :, None, None]
            inputs[f"std_{name}"] = statistics.std[levels[name]][:, :, None, None]
        return request, raw.records, inputs

    def make(self, prepared: tuple[BatchRequest, np.ndarray, dict[str, np.ndarray]]) -> Batch:
        """The batch, on the host."""
        request, records, inputs = prepared
        num_samples = len(request.sample_ids)
        if self._pipeline is None:
            self._pipeline = self._define(num_samples)
        outputs = [torch.from_dlpack(out.as_tensor()) for out in self._pipeline.run(**inputs)]
        values, valid = {}, {}
        for name, value, flags in zip(self._entries, outputs[::2], outputs[1::2], strict=True):
            values[name] = value.to(self._dtype) if name in self._continuous else value
            valid[name] = flags.view(torch.bool)
        tile_values, tile_valid = self._assembler.tiles(request.sample_ids, records)
        return Batch(
            values | tile_values,
            valid | tile_valid,
            torch.from_numpy(np.array(request.sample_ids, np.int64)),
            request.num_present,
            request.global_batch_size,
            None if request.padding is None else torch.from_numpy(np.array(request.padding)),
        )

    def hand_over(self, made: Batch) -> Batch:
        """The batch as it is."""
        return made

    def close(self) -> None:
        """Nothing to let go of: DLPack keeps the outputs for as long as a tensor needs them."""

    def _define(self, num_samples: int) -> Pipeline:
        """The pipeline: per modality values [N, C, H, H] (float32 or int64) and valid flags (uint8)."""
        pipeline = Pipeline(num_samples, self._num_threads, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
        side = self._img_size_px
        with pipeline:
            start = fn.external_source(name="start", ndim=1, dtype=types.INT32)
            flips = {
                axis: fn.external_source(name=f"{axis[0]}flip", ndim=0, dtype=types.INT32)
                for axis in ("horizontal", "vertical")
            }
            outputs = []
            for name, entry in self._entries.items():
                raw = fn.external_source(name=name, layout="CHW", dtype=_CPU_TYPES[np.dtype(entry.dtype).name])
                raw = fn.flip(fn.slice(raw, start=start, shape=[side, side], axis_names="HW"), **flips)
                values, valid = self._normalised(name, raw) if name in self._continuous else self._classes(name, raw)
                outputs += [values, fn.cast(valid, dtype=types.UINT8)]
            pipeline.set_outputs(*outputs)
        return pipeline

    def _normalised(self, name: str, raw):
        mean, std = (fn.external_source(name=f"{what}_{name}", ndim=3, dtype=types.FLOAT) for what in ("mean", "std"))
        dtype, rule = np.dtype(self._entries[name].dtype), self._assembler.no_data[name]
        valid = (raw - raw) == 0 if rule.non_finite and dtype.kind == "f" else raw == raw
        for code in self._assembler.maps[name].codes.tolist():
            valid = valid & (raw != types.Constant(code, dtype=_CPU_TYPES[dtype.name]))
        clean = _zero_unless(valid, fn.cast(raw, dtype=types.FLOAT))
        return _zero_unless(valid, (clean - mean) / std), valid

    def _classes(self, name: str, raw):
        lookup = self._assembler.maps[name].lookup
        codes = list(range(len(lookup)))  # all of them: an empty table crashes DALI 2.4
        classes = fn.lookup_table(raw, keys=codes, values=lookup.tolist(), default_value=-1, dtype=types.INT64)
        return classes, classes >= 0


def _zero_unless(valid, values):
    """float32 `values` where `valid`, else +0: by their bits, as a product with 0 would keep NaN and give -0."""
    bits = fn.reinterpret(values, dtype=types.INT32) * fn.cast(valid, dtype=types.INT32)
    return fn.reinterpret(bits, dtype=types.FLOAT)
