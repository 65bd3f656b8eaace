"""Depthwise 7x7 over packed tiles in Triton, where CUDA C++ can't run: forward, input gradient, weight gradient.

A program holds a block of output sites, one accumulator per site, and the 49 weights of its channels in registers, and walks
the cells around the block: a cell that is absent is skipped by a branch that the whole program takes, of one that is there
each site is read once and added to all outputs that it reaches. Only the addresses of cells are computed at run time.
README.md has the count. The functions trust their arguments, which `ops.py` checks.

Shapes: N samples, V visible patches per sample, s sites on a side of a tile (8, 4, 2 or 1), T = s*s, K = V*T sites per
sample, G patches on a side of the image, C channels, P programs that share the weight gradient of some channels. A cell is a
square of sites that are neighbours in memory: a quarter of a tile at s = 8, else a tile. A block is one cell, at s = 1 4x4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_TAPS = tl.constexpr(49)
UNIT_CELLS_SIDE = 4
NUM_WARPS = 1
SITES_PER_PROGRAM = 64
MAX_GRADIENT_PROGRAMS = 1536
MIN_PROGRAMS = 2048
REDUCED_ROWS, REDUCED_CHANNELS = 128, 32


@triton.constexpr_function
def _tap(near_row, near_column, site, target, cell_side, block_side):
    """The tap that takes the input `site` of a cell to the output `target` of the block, -1 if it does not reach it.

    near_row, near_column: the cell's place, counted in cells from the block's first one. Sites of a cell are in Morton
    order, cells of a block in raster order.
    """

    def morton(position):
        return (position >> 1 & 1) + (position >> 2 & 2), (position & 1) + (position >> 1 & 2)

    cell, inside = divmod(target, cell_side * cell_side)
    row, column = morton(site)
    target_row, target_column = morton(inside)
    down = (near_row - cell // block_side) * cell_side + row - target_row
    right = (near_column - cell % block_side) * cell_side + column - target_column
    return (down + 3) * 7 + right + 3 if max(abs(down), abs(right)) <= 3 else -1


@triton.constexpr_function
def _is_needed(near_row, near_column, site, cell_side, block_side):
    """Whether the input `site` of a cell reaches any output of the block."""
    row = near_row * cell_side + (site >> 1 & 1) + (site >> 2 & 2)
    column = near_column * cell_side + (site & 1) + (site >> 1 & 2)
    return min(row, column) >= -3 and max(row, column) < cell_side * block_side + 3


@triton.jit
def _program(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's number among those of its channels, the channels, and which of them there are."""
    channel_blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    channel = tl.program_id(0) % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.program_id(0) // channel_blocks, channel, channel < C


@triton.jit
def _place(block, visible, num_visible, G: tl.constexpr, CELL: tl.constexpr, HALVINGS: tl.constexpr, BLOCK: tl.constexpr):
    """The sample of a block, and row and column of its first cell, in cells of the grid that the slots span."""
    if CELL == 1:
        blocks_side: tl.constexpr = (G + BLOCK - 1) // BLOCK
        sample = block // (blocks_side * blocks_side)
        row = block // blocks_side % blocks_side * BLOCK + 3
        column = block % blocks_side * BLOCK + 3
    else:
        tile = block >> 2 * HALVINGS
        sample = tile // num_visible
        patch = tl.load(visible + tile).to(tl.int32)
        row = (patch // G + 3 << HALVINGS) + (block >> 1 & HALVINGS)
        column = (patch % G + 3 << HALVINGS) + (block & HALVINGS)
    return sample, row, column


@triton.jit
def _cell(
    slots,
    sample,
    block_row,
    block_column,
    near_row: tl.constexpr,
    near_column: tl.constexpr,
    G: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where in its sample a cell near a block lies, in cells; negative if it is absent."""
    WIDTH: tl.constexpr = G + 6
    row = block_row + near_row
    column = block_column + near_column
    tile_row = row >> HALVINGS
    tile_column = column >> HALVINGS
    place = slots + (sample * (WIDTH * WIDTH) + tile_row * WIDTH + tile_column)
    # the last blocks hang over the grid by -G % BLOCK cells, more than the border of the slots bears
    if max(near_row, near_column) < BLOCK + 3 - -G % BLOCK:
        slot = tl.load(place).to(tl.int32)
    else:
        slot = tl.load(place, mask=(tile_row < WIDTH) & (tile_column < WIDTH), other=-1).to(tl.int32)
    return (slot << 2 * HALVINGS) + ((row & HALVINGS) << 1) + (column & HALVINGS)


@triton.jit
def _convolve_kernel(
    out,
    x,
    taps,
    bias,
    residual,
    visible,
    slots,
    num_visible,
    num_blocks,
    blocks_per_program,
    C: tl.constexpr,
    G: tl.constexpr,
    CELL: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [N, K, C] = convolution of x [N, K, C] with taps [49, C] (reversed if FLIP), + bias [C], + residual [N, K, C]."""
    reach: tl.constexpr = (2 + CELL) // CELL
    cell_sites: tl.constexpr = CELL * CELL
    program, channel, inside = _program(C, BLOCK_C)
    weights = ()
    for tap in tl.static_range(NUM_TAPS):
        weights = weights + (tl.load(taps + (NUM_TAPS - 1 - tap if FLIP else tap) * C + channel, mask=inside, other=0),)
    start = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        start += tl.load(bias + channel, mask=inside, other=0).to(tl.float32)
    first = program * blocks_per_program
    for block in range(first, tl.minimum(first + blocks_per_program, num_blocks)):
        sample, block_row, block_column = _place(block, visible, num_visible, G, CELL, HALVINGS, BLOCK)
        shift = sample.to(tl.int64) * num_visible * ((CELL << HALVINGS) * (CELL << HALVINGS) * C)
        here = x + shift + channel
        sums = (start,) * (BLOCK * BLOCK * cell_sites)
        for near_row in tl.static_range(-reach, BLOCK + reach):
            for near_column in tl.static_range(-reach, BLOCK + reach):
                cell = _cell(slots, sample, block_row, block_column, near_row, near_column, G, HALVINGS, BLOCK)
                if cell >= 0:
                    near = here + cell * (cell_sites * C)
                    for site in tl.static_range(cell_sites):
                        if _is_needed(near_row, near_column, site, CELL, BLOCK):
                            value = tl.load(near + site * C, mask=inside, other=0).to(tl.float32)
                            for target in tl.static_range(BLOCK * BLOCK * cell_sites):
                                if _tap(near_row, near_column, site, target, CELL, BLOCK) >= 0:
                                    weight = weights[_tap(near_row, near_column, site, target, CELL, BLOCK)]
                                    sums = sums[:target] + (tl.fma(value, weight, sums[target]),) + sums[target + 1 :]
        for own in tl.static_range(BLOCK * BLOCK):
            cell = _cell(slots, sample, block_row, block_column, own // BLOCK, own % BLOCK, G, HALVINGS, BLOCK)
            if cell >= 0:
                place = shift + cell * (cell_sites * C) + channel
                for site in tl.static_range(cell_sites):
                    value = sums[own * cell_sites + site]
                    if residual is not None:
                        value += tl.load(residual + place + site * C, mask=inside, other=0).to(tl.float32)
                    tl.store(out + place + site * C, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _weight_gradient_kernel(
    partial,
    grad,
    x,
    visible,
    slots,
    num_visible,
    num_blocks,
    blocks_per_program,
    C: tl.constexpr,
    G: tl.constexpr,
    CELL: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial [P, 50, C]: the gradients of the 49 taps and of the bias over the blocks of each program."""
    reach: tl.constexpr = (2 + CELL) // CELL
    cell_sites: tl.constexpr = CELL * CELL
    part, channel, inside = _program(C, BLOCK_C)
    sums = (tl.zeros([BLOCK_C], tl.float32),) * NUM_TAPS
    bias_sum = tl.zeros([BLOCK_C], tl.float32)
    first = part * blocks_per_program
    for block in range(first, tl.minimum(first + blocks_per_program, num_blocks)):
        sample, block_row, block_column = _place(block, visible, num_visible, G, CELL, HALVINGS, BLOCK)
        shift = sample.to(tl.int64) * num_visible * ((CELL << HALVINGS) * (CELL << HALVINGS) * C) + channel
        grads = ()
        for own in tl.static_range(BLOCK * BLOCK):
            cell = _cell(slots, sample, block_row, block_column, own // BLOCK, own % BLOCK, G, HALVINGS, BLOCK)
            for site in tl.static_range(cell_sites):
                place = grad + shift + (cell * cell_sites + site) * C
                grads = grads + (tl.load(place, mask=inside & (cell >= 0), other=0).to(tl.float32),)
                bias_sum += grads[own * cell_sites + site]
        for near_row in tl.static_range(-reach, BLOCK + reach):
            for near_column in tl.static_range(-reach, BLOCK + reach):
                cell = _cell(slots, sample, block_row, block_column, near_row, near_column, G, HALVINGS, BLOCK)
                if cell >= 0:
                    near = x + shift + cell * (cell_sites * C)
                    for site in tl.static_range(cell_sites):
                        if _is_needed(near_row, near_column, site, CELL, BLOCK):
                            value = tl.load(near + site * C, mask=inside, other=0).to(tl.float32)
                            for target in tl.static_range(BLOCK * BLOCK * cell_sites):
                                if _tap(near_row, near_column, site, target, CELL, BLOCK) >= 0:
                                    before = sums[: _tap(near_row, near_column, site, target, CELL, BLOCK)]
                                    old = sums[_tap(near_row, near_column, site, target, CELL, BLOCK)]
                                    after = sums[_tap(near_row, near_column, site, target, CELL, BLOCK) + 1 :]
                                    sums = before + (tl.fma(value, grads[target], old),) + after
    to = partial + part * ((NUM_TAPS + 1) * C) + channel
    for tap in tl.static_range(NUM_TAPS):
        tl.store(to + tap * C, sums[tap], mask=inside)
    tl.store(to + NUM_TAPS * C, bias_sum, mask=inside)


@triton.jit
def _reduce_kernel(grad_weight, grad_bias, partial, num_parts, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """grad_weight [C, 49] and grad_bias [C] from partial [P, 50, C], summed in an order that P alone sets."""
    tap = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for first in range(0, num_parts, ROWS):
        part = first + row
        place = partial + (part[:, None] * (NUM_TAPS + 1) + tap) * C + channel[None, :]
        sums += tl.load(place, mask=(part < num_parts)[:, None] & (channel < C)[None, :], other=0)
    total = tl.sum(sums, 0)
    if tap < NUM_TAPS:
        tl.store(grad_weight + channel * NUM_TAPS + tap, total, mask=channel < C)
    else:
        tl.store(grad_bias + channel, total, mask=channel < C)


def forward(x: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> Tensor:
    """The depthwise convolution of the packed sites, an absent neighbour contributing 0: [N, K, C] of the dtype of `x`.

    x: [N, K, C], bfloat16, float16 or float32, contiguous, fewer than 2**31 elements in a sample; 0 at sites that hold no
    data. weight: [C, 1, 7, 7] and bias: [C], of any floating dtype. visible: int64 [N, V], slots: int16 [N, G+6, G+6] from
    `tile_slots`. tile_side: s. Sums are taken in float32.
    """
    return _convolve(x, weight, bias, None, visible, slots, tile_side, flip=False)


def backward_input(
    grad_y: Tensor, weight: Tensor, visible: Tensor, slots: Tensor, tile_side: int, residual: Tensor | None = None
) -> Tensor:
    """The gradient of the input, plus `residual` where given (rounded once): [N, K, C] of the dtype of `grad_y`.

    grad_y: [N, K, C], 0 at sites that hold no data. residual: [N, K, C] of the same dtype. The rest as in `forward`;
    this is its convolution with the taps in reverse order.
    """
    return _convolve(grad_y, weight, None, residual, visible, slots, tile_side, flip=True)


def backward_weight(grad_y: Tensor, x: Tensor, visible: Tensor, slots: Tensor, tile_side: int) -> tuple[Tensor, Tensor]:
    """The gradients of weight [C, 1, 7, 7] and bias [C], float32, the same bits in every run.

    grad_y, x: [N, K, C] of one dtype, both 0 at sites that hold no data. The rest as in `forward`. P programs per group of
    channels leave P*50*C float32 sums (20 MB at most), which a second kernel adds in a fixed order.
    """
    channels = x.shape[-1]
    layout = layout_constants(tile_side, slots.shape[1] - 6)
    num_blocks, width = _num_blocks(layout, *visible.shape), block_channels(channels)
    channel_blocks = triton.cdiv(channels, width)
    per_program = max(1, triton.cdiv(num_blocks, max(1, MAX_GRADIENT_PROGRAMS // channel_blocks)))
    num_parts = triton.cdiv(num_blocks, per_program)
    partial = torch.empty(num_parts, NUM_TAPS.value + 1, channels, dtype=torch.float32, device=x.device)
    grad_weight = torch.empty(channels, 1, 7, 7, dtype=torch.float32, device=x.device)
    grad_bias = torch.empty(channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        if num_parts:
            _weight_gradient_kernel[(num_parts * channel_blocks,)](
                partial, grad_y, x, visible, slots, visible.shape[1], num_blocks, per_program,
                C=channels, **layout, BLOCK_C=width, **launch_options(tile_side),
            )  # fmt: skip
        _reduce_kernel[(NUM_TAPS.value + 1, triton.cdiv(channels, REDUCED_CHANNELS))](
            grad_weight, grad_bias, partial, num_parts, C=channels, ROWS=REDUCED_ROWS, BLOCK_C=REDUCED_CHANNELS
        )
    return grad_weight, grad_bias


def _convolve(x, weight, bias, residual, visible, slots, tile_side, flip):
    channels = x.shape[-1]
    layout = layout_constants(tile_side, slots.shape[1] - 6)
    num_blocks, width = _num_blocks(layout, *visible.shape), block_channels(channels)
    channel_blocks = triton.cdiv(channels, width)
    most = SITES_PER_PROGRAM // (layout["BLOCK"] * layout["CELL"]) ** 2
    per_program = min(most, max(1, num_blocks * channel_blocks // MIN_PROGRAMS))
    out = torch.empty_like(x)
    # tap-major, so that a program's lanes read neighbouring addresses
    taps = torch.empty(NUM_TAPS.value, channels, dtype=torch.float32, device=x.device).copy_(weight.view(channels, -1).t())
    with torch.cuda.device_of(x):
        if num_blocks:
            _convolve_kernel[(triton.cdiv(num_blocks, per_program) * channel_blocks,)](
                out, x, taps, bias, residual, visible, slots, visible.shape[1], num_blocks, per_program,
                C=channels, **layout, FLIP=flip, BLOCK_C=width, **launch_options(tile_side),
            )  # fmt: skip
    return out


def layout_constants(tile_side: int, num_patches_side: int) -> dict[str, int]:
    """The kernels' compile-time geometry: G, sites on a side of a cell, halvings from tile to cell, cells on a block's."""
    halvings = 1 if tile_side == 8 else 0
    block = UNIT_CELLS_SIDE if tile_side == 1 else 1
    return {"G": num_patches_side, "CELL": tile_side >> halvings, "HALVINGS": halvings, "BLOCK": block}


def launch_options(tile_side: int) -> dict[str, int]:
    """Warps and the cap on registers. Left alone at s = 1, the assembler spills a register to fit 12 warps on an SM."""
    return {"num_warps": NUM_WARPS} | ({"maxnreg": 224} if tile_side == 1 else {})


def _num_blocks(layout: dict[str, int], num_samples: int, num_visible: int) -> int:
    if layout["BLOCK"] == 1:
        return num_samples * num_visible << 2 * layout["HALVINGS"]
    return num_samples * triton.cdiv(layout["G"], layout["BLOCK"]) ** 2 if num_visible else 0


def block_channels(channels: int) -> int:
    """Channels of a program: two per lane take half as many instructions again as one per lane, and twice the registers."""
    return min((32, 2), (64, 3), key=lambda option: triton.cdiv(channels, option[0]) * option[1])[0]
