"""Which specialisation of `depthwise.cu` runs a problem, and on what grid: pure arithmetic, no GPU.

Shapes as in `mpmae.kernels`; a CTA works on a chunk of channels and keeps a stage in shared memory at a time: whole samples,
or a region of one sample. Every plan that fits is scored by a rough model of the hardware (`_score`) and the best is taken.
The model has been set from counted instructions and registers, not from measured times.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from mpmae.kernels.checks import MAX_PATCHES_SIDE, TILE_SIDES

OPS = {"forward": 0, "backward_input": 1, "backward_input_residual": 2, "backward_weight": 3}
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NUM_TAPS = 49
SUMS = NUM_TAPS + 1
BLOCK_SIDE = 7  # most patches on a side of what a thread computes at s = 1
WARP = 32
MAX_THREADS = 1024
MAX_WARPS = 20
MAX_GRID_Y = 65535
MIN_ARCHITECTURE = 80
MULTIPROCESSORS = {80: 108, 90: 132}
SUBPARTITIONS = 4  # of a multiprocessor
MAX_CTAS = 16  # of a multiprocessor, on every architecture
RESERVED_BYTES = 1024  # of a multiprocessor's shared memory for each CTA
IN_FLIGHT_BYTES = 32 << 10  # that a multiprocessor has to ask for at a time to keep the memory busy
REGIONS = (4, 3, 2, 1)
# (stages, CTAs of a multiprocessor) -> how much of the copying hides behind arithmetic
OVERLAP = {(1, 1): 0.6, (1, 2): 0.85, (2, 1): 0.95}
# (s, lanes, channels of each) -> instructions per output, counted in the machine code for 19 of 49 patches
SLOTS = {(4, 32, 2): 36, (4, 32, 1): 42, (4, 16, 1): 55, (2, 32, 2): 45, (2, 32, 1): 68}


@dataclass(frozen=True)
class Problem:
    """What is asked: op (of OPS), dtype of the activations, weight_dtype, N, V, G, s and C."""

    op: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    num_samples: int
    num_visible: int
    num_patches_side: int
    tile_side: int
    channels: int


@dataclass(frozen=True)
class Device:
    """What the plan has to fit: compute capability (90), dynamic shared memory of one CTA at most, multiprocessors."""

    architecture: int
    shared_limit: int
    num_multiprocessors: int


@dataclass(frozen=True)
class Plan:
    """A launch of one kernel: its name, the macros that make it, threads and dynamic shared memory of a CTA.

    partial_shape: of the float32 scratch between the two stages of a weight gradient, else None.
    """

    kernel_name: str
    defines: dict[str, str | int]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    partial_shape: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Shape:
    """One way to cut a problem; the macros of the kernel by their names there."""

    lanes: int
    per_lane: int
    groups: int
    workers: int
    stages: int
    samples: int
    region: int
    shared_bytes: int
    stage_bytes: int
    max_warps: int
    min_ctas: int = 1

    @property
    def chunk(self) -> int:
        """Channels of a CTA."""
        return self.groups * self.lanes * self.per_lane

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self.groups * self.workers


@cache
def plan(problem: Problem, device: Device) -> Plan:
    """The launch for a problem on a device. Raises ValueError with everything that it does not take."""
    _refuse(problem, device)
    shapes = [_occupied(shape, device) for shape in _shapes(problem, device.shared_limit, (0,))]
    if not any(shape.stages * shape.min_ctas > 1 for shape in shapes):  # nothing would overlap the copies of whole samples
        regions = (block_side(problem.num_patches_side),) if problem.tile_side == 1 else REGIONS
        shapes += [_occupied(shape, device) for shape in _shapes(problem, device.shared_limit, regions)]
    shape = max(shapes, key=lambda shape: (_score(problem, device, shape), -shape.shared_bytes))
    chunks = _ceil(problem.channels, shape.chunk)
    items = _items(problem, shape)
    rows = max(1, device.num_multiprocessors * shape.min_ctas // chunks)
    rows = min(_ceil(items, _ceil(items, rows)), MAX_GRID_Y)
    name = f"depthwise_{problem.op}_s{problem.tile_side}_c{problem.channels}"
    defines: dict[str, str | int] = {
        "KERNEL": name,
        "OP": OPS[problem.op],
        "ELEMENT": ELEMENTS[problem.dtype],
        "WEIGHT": ELEMENTS[problem.weight_dtype],
        "SIDE": problem.tile_side,
        "GRID_SIDE": problem.num_patches_side,
        "CHANNELS": problem.channels,
        "LANES": shape.lanes,
        "PER_LANE": shape.per_lane,
        "GROUPS": shape.groups,
        "WORKERS": shape.workers,
        "STAGES": shape.stages,
        "SAMPLES": shape.samples,
        "REGION": shape.region,
        "COPY_BYTES": _copy_bytes(problem),
        "MIN_CTAS": shape.min_ctas,
    }
    partial = (rows, problem.channels, SUMS) if problem.op == "backward_weight" else None
    return Plan(name, defines, (chunks, rows, 1), (WARP * shape.warps, 1, 1), shape.shared_bytes, partial)


@cache
def plan_sum(partial_shape: tuple[int, int, int]) -> Plan:
    """The second stage of a weight gradient: adds up the partial gradients [rows, C, 50]."""
    channels = partial_shape[1]
    name = f"depthwise_sum_c{channels}"
    defines: dict[str, str | int] = {"KERNEL": name, "OP": 4, "CHANNELS": channels}
    return Plan(name, defines, (_ceil(channels * SUMS, WARP), 1, 1), (256, 1, 1), 4 * 256)


def _refuse(problem: Problem, device: Device) -> None:
    p, problems = problem, []
    if p.op not in OPS:
        problems.append(f"op {p.op!r}, expected one of {', '.join(OPS)}")
    for name, dtype in (("activations", p.dtype), ("weight", p.weight_dtype)):
        if dtype not in ELEMENTS:
            problems.append(f"{name} of {dtype}, expected one of {', '.join(map(str, ELEMENTS))}")
    if p.tile_side not in TILE_SIDES:
        problems.append(f"tile side {p.tile_side}, expected one of {', '.join(map(str, TILE_SIDES))}")
    if not 1 <= p.num_patches_side <= MAX_PATCHES_SIDE:
        problems.append(f"{p.num_patches_side} patches on a side, expected 1 to {MAX_PATCHES_SIDE}")
    elif not 1 <= p.num_visible <= p.num_patches_side**2:
        problems.append(f"{p.num_visible} visible patches, expected 1 to {p.num_patches_side**2} (all of the image)")
    if p.num_samples < 1 or p.channels < 1:
        problems.append(f"{p.num_samples} samples of {p.channels} channels, expected at least one of each")
    if p.num_visible * p.tile_side**2 * p.channels >= 2**31:
        problems.append(f"{p.num_visible} tiles x {p.tile_side**2} sites x {p.channels} channels, expected less than 2**31")
    if p.num_samples * p.num_patches_side**2 >= 2**31:
        problems.append(f"{p.num_samples} samples of {p.num_patches_side**2} patches, expected less than 2**31 patches")
    if device.architecture < MIN_ARCHITECTURE:
        problems.append(f"compute capability {device.architecture / 10}, expected at least {MIN_ARCHITECTURE / 10}")
    if problems:
        raise ValueError(f"depthwise kernel: {'; '.join(problems)}")


def _shapes(problem: Problem, shared_limit: int, regions: tuple[int, ...]) -> Iterator[Shape]:
    """Every way to cut the problem that fits the shared memory, with stages of whole samples (0) or of regions."""
    lanes, per_lane, max_warps = _lanes(problem)
    side, element_bytes = problem.tile_side, problem.dtype.itemsize
    group = lanes * per_lane
    quadrants = 4 if side == 8 else 1
    padding = quadrants * _ceil(group * element_bytes, 16) * 16 if lanes < WARP else 0
    max_groups = min(_ceil(problem.channels, group), max_warps)
    for region, groups in itertools.product(regions, range(1, max_groups + 1)):
        tile_bytes = side**2 * groups * group * element_bytes + padding
        zeros = tile_bytes if lanes < WARP else 0
        sums_bytes = groups * group * SUMS * 4
        window = (region + 2 * _reach(side)) ** 2 if region else problem.num_visible
        for samples in (1,) if region else [2**k for k in range(5) if k == 0 or 2**k <= problem.num_samples]:
            stage_bytes = samples * window * tile_bytes
            for stages in (1, 2):
                shared = max(zeros + stages * stage_bytes, sums_bytes)
                if shared > shared_limit:
                    continue
                for workers in range(1, max_warps // groups + 1):
                    yield Shape(lanes, per_lane, groups, workers, stages, samples, region, shared, stage_bytes, max_warps)


def _lanes(problem: Problem) -> tuple[int, int, int]:
    """Lanes of a warp along channels, channels of each, warps of a multiprocessor that their registers leave room for."""
    side, channels = problem.tile_side, problem.channels
    single = 20 if _copy_bytes(problem) == 16 else 16  # narrow copies take registers for their addresses
    is_half = problem.dtype.itemsize == 2
    if side == 8:
        return (8, 2, 12) if is_half and channels % 16 == 0 else (8, 1, single)
    if side == 1:
        return WARP, 1, 16 if problem.num_patches_side <= BLOCK_SIDE else 12
    usable = [key for key in SLOTS if key[0] == side and (key[2] == 1 or (is_half and channels % 2 == 0))]
    _, lanes, per_lane = min(usable, key=lambda key: SLOTS[key] * _ceil(channels, key[1] * key[2]) * key[1] * key[2])
    return lanes, per_lane, 12 if per_lane == 2 else single


def _occupied(shape: Shape, device: Device) -> Shape:
    """`shape` with the CTAs that share a multiprocessor."""
    by_memory = (device.shared_limit + RESERVED_BYTES) // (shape.shared_bytes + RESERVED_BYTES)
    return replace(shape, min_ctas=max(1, min(by_memory, shape.max_warps // shape.warps, MAX_CTAS)))


def _score(problem: Problem, device: Device, shape: Shape) -> float:
    """How near to the limits of the hardware a shape comes, roughly: a product of fractions."""
    chunks = _ceil(problem.channels, shape.chunk)
    units = shape.samples * _units(problem, shape)
    balance = units / (_ceil(units, shape.workers) * shape.workers)
    resident = shape.min_ctas * shape.warps / shape.max_warps
    overlap = OVERLAP.get((shape.stages, shape.min_ctas), 0.95 if shape.stages == 1 else 1.0)
    sector_bytes = shape.chunk * problem.dtype.itemsize
    whole_sectors = chunks == 1 or (sector_bytes % 32 == 0 and problem.channels * problem.dtype.itemsize % 32 == 0)
    sectors = 1.0 if whole_sectors else max(0.6, 1 - 16 / sector_bytes)
    used = problem.channels / (chunks * shape.chunk)
    in_flight = min(1.0, shape.min_ctas * shape.stages * shape.stage_bytes / 2 / IN_FLIGHT_BYTES)
    slots = device.num_multiprocessors * shape.min_ctas
    ctas = chunks * _items(problem, shape)
    fill = ctas / (_ceil(ctas, slots) * slots)
    read_again = ((shape.region + 2 * _reach(problem.tile_side)) / shape.region) ** 2 if shape.region else 1.0
    dealt = 1.0 if shape.warps % SUBPARTITIONS == 0 else 0.95  # a CTA's warps are dealt to the four in turn
    return dealt * balance * resident**0.5 * overlap * sectors * used * in_flight**0.5 * fill**0.5 * 2 / (1 + read_again)


def _units(problem: Problem, shape: Shape) -> int:
    """Pieces of work of a sample or region, one warp at a time on each."""
    if problem.tile_side == 1:
        return 1 if shape.region else _ceil(problem.num_patches_side, block_side(problem.num_patches_side)) ** 2
    tiles = shape.region**2 or problem.num_visible
    return tiles if problem.tile_side == 8 else _ceil(tiles, WARP // shape.lanes)


def _items(problem: Problem, shape: Shape) -> int:
    """Stages of the whole problem, for one chunk of channels."""
    if shape.region:
        return problem.num_samples * _ceil(problem.num_patches_side, shape.region) ** 2
    return _ceil(problem.num_samples, shape.samples)


def _copy_bytes(problem: Problem) -> int:
    """The widest copy to which the rows of all chunks are aligned."""
    row = problem.channels * problem.dtype.itemsize
    return next(width for width in (16, 8, 4, 2) if row % width == 0)


def block_side(num_patches_side: int) -> int:
    """Patches on a side of what a thread computes at s = 1."""
    return _ceil(num_patches_side, _ceil(num_patches_side, BLOCK_SIDE))


def _reach(tile_side: int) -> int:
    return _ceil(3, tile_side)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
