// Depthwise 7x7 convolution over tile-packed sites: forward, input gradient, weight and bias gradient.
//
// One source, no includes; compiled by NVRTC or nvcc, once per specialisation. Macros (`plan.py` chooses them):
//   KERNEL            name of the kernel
//   OP                0 forward, 1 input gradient, 2 input gradient + residual, 3 partial weight gradients, 4 their sum
//   ELEMENT, WEIGHT   type of activations, of weight and bias: 0 float, 1 bfloat16, 2 half
//   SIDE              s, sites on a side of a tile: 8, 4, 2, 1
//   GRID_SIDE         G, patches on a side of the image
//   CHANNELS          C
//   LANES, PER_LANE   lanes of a warp that lie along channels, and channels of each; 32 / LANES subgroups share a warp
//   GROUPS, WORKERS   a CTA has GROUPS x WORKERS warps: one warp works on one group of LANES * PER_LANE channels
//   STAGES, SAMPLES   buffers of the copy pipeline, samples in each
//   REGION            0: a buffer holds whole samples; R: the R x R patches of a region and the tiles within reach of it
//   COPY_BYTES        width of a copy from global to shared memory: 16, 8, 4 or 2
//   MIN_CTAS          CTAs per multiprocessor that registers must allow
//
// Shapes: x, y, gradients [N, V*s*s, C], Morton order inside a tile; weight [C, 49]; visible [N, V];
// slots [N, G+6, G+6], -1 where a patch is absent; partial [gridDim.y, C, 50], the bias gradient last.

#ifndef EMULATED
#define DYNAMIC_SHARED extern __shared__ __align__(16) char shared[]
#endif

constexpr int FORWARD = 0, WITH_RESIDUAL = 2, WEIGHT_GRADIENT = 3;
constexpr int FLOAT = 0, BFLOAT16 = 1;
constexpr int RADIUS = 3, TAPS_SIDE = 7, TAPS = 49, SUMS = TAPS + 1;
constexpr unsigned WARP = 0xffffffffu;

#if OP == 4

// Adds up the partial gradients in a fixed order: 32 sums per CTA of 32 x 8 threads.
extern "C" __global__ void __launch_bounds__(256)
KERNEL(const float* partial, float* grad_weight, float* grad_bias, int num_partials) {
  DYNAMIC_SHARED;
  float* rows = reinterpret_cast<float*>(shared);
  const int column = threadIdx.x % 32, row = threadIdx.x / 32;
  const int index = blockIdx.x * 32 + column;
  float sum = 0.f;
  if (index < CHANNELS * SUMS) {
#pragma unroll 4
    for (int i = row; i < num_partials; i += 8) sum += partial[static_cast<long long>(i) * CHANNELS * SUMS + index];
  }
  rows[threadIdx.x] = sum;
  __syncthreads();
  if (row == 0 && index < CHANNELS * SUMS) {
    for (int i = 1; i < 8; ++i) sum += rows[i * 32 + column];
    const int channel = index / SUMS, tap = index % SUMS;
    if (tap < TAPS) grad_weight[channel * TAPS + tap] = sum;
    else grad_bias[channel] = sum;
  }
}

#else

constexpr int SITES = SIDE * SIDE;
constexpr int ELEMENT_BYTES = ELEMENT == FLOAT ? 4 : 2;
constexpr int SUBGROUPS = 32 / LANES;
constexpr int GROUP_CHANNELS = LANES * PER_LANE;
constexpr int CHUNK = GROUPS * GROUP_CHANNELS;  // channels of a CTA
constexpr int THREADS = 32 * GROUPS * WORKERS;
constexpr int REACH = (RADIUS + SIDE - 1) / SIDE;  // tiles that a neighbourhood extends over, on each side

// A tile of 8x8 is computed by four subgroups, one quadrant each. Each looks at the tile in a frame of its own, mirrored so
// that its quadrant is the upper left one: then all four run the same code and need only the tiles above, left and
// diagonally above. Every quadrant lies in shared memory in the order of its own frame.
constexpr bool MIRRORED = SIDE == 8;
constexpr int QUADRANT_SITES = MIRRORED ? SITES / 4 : SITES;
constexpr int BLOCKS_SIDE = SIDE == 1 ? (GRID_SIDE + 6) / 7 : 1;  // at s = 1 a thread computes a block of patches
constexpr int BLOCK = MIRRORED ? 4 : SIDE == 1 ? (GRID_SIDE + BLOCKS_SIDE - 1) / BLOCKS_SIDE : SIDE;
constexpr int OUTPUTS = BLOCK * BLOCK;  // sites of one thread at a time

constexpr int ROW = CHUNK * ELEMENT_BYTES;  // bytes of a site in shared memory
constexpr int PAD = SUBGROUPS > 1 ? (LANES * PER_LANE * ELEMENT_BYTES + 15) / 16 * 16 : 0;  // spreads subgroups over banks
constexpr int QUADRANT_BYTES = QUADRANT_SITES * ROW + PAD;
constexpr int TILE_BYTES = QUADRANT_BYTES * (SITES / QUADRANT_SITES);
// Subgroups take the same branch together; one whose own neighbour is absent reads this tile of zeros.
constexpr int ZERO_BYTES = SUBGROUPS > 1 ? TILE_BYTES : 0;

constexpr int REGION_SIDE = REGION ? REGION : 1;
constexpr int WIDTH = REGION + 2 * REACH;  // of the window of a region
constexpr int REGIONS_SIDE = REGION ? (GRID_SIDE + REGION - 1) / REGION : 1;
constexpr int NEIGHBOURS_SIDE = MIRRORED ? 2 : 2 * REACH + 1;
constexpr int NEIGHBOURS = NEIGHBOURS_SIDE * NEIGHBOURS_SIDE;
constexpr int OWN = MIRRORED ? 0 : NEIGHBOURS / 2;
constexpr int TILES_PER_UNIT = MIRRORED ? 1 : SUBGROUPS;

template <int KIND> struct Stored { using type = unsigned short; };
template <> struct Stored<FLOAT> { using type = float; };
using Element = Stored<ELEMENT>::type;
using Weight = Stored<WEIGHT>::type;

template <int KIND> __device__ __forceinline__ float widen(typename Stored<KIND>::type value) {
  if constexpr (KIND == FLOAT) return value;
  else if constexpr (KIND == BFLOAT16) return __uint_as_float(static_cast<unsigned>(value) << 16);
  else {
#ifdef EMULATED
    return emulated_half_to_float(value);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value));
    return wide;
#endif
  }
}

template <int KIND> __device__ __forceinline__ typename Stored<KIND>::type narrow(float value) {
  if constexpr (KIND == FLOAT) return value;
#ifdef EMULATED
  else return KIND == BFLOAT16 ? emulated_float_to_bfloat16(value) : emulated_float_to_half(value);
#else
  else {
    unsigned short bits;
    if constexpr (KIND == BFLOAT16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
#endif
}

// The PER_LANE channels at an address, in one load.
__device__ __forceinline__ void read(float (&value)[PER_LANE], const void* address) {
  if constexpr (PER_LANE == 1) value[0] = widen<ELEMENT>(*static_cast<const Element*>(address));
  else {
    const unsigned pair = *static_cast<const unsigned*>(address);
    value[0] = widen<ELEMENT>(static_cast<Element>(pair));
    value[1] = widen<ELEMENT>(static_cast<Element>(pair >> 16));
  }
}

__device__ __forceinline__ void write(Element* address, const float (&value)[PER_LANE]) {
  if constexpr (PER_LANE == 1) *address = narrow<ELEMENT>(value[0]);
  else {
    const unsigned low = narrow<ELEMENT>(value[0]), high = narrow<ELEMENT>(value[1]);
    *reinterpret_cast<unsigned*>(address) = low | high << 16;
  }
}

__device__ constexpr int morton(int row, int column) {
  int position = 0;
  for (int bit = 0; bit < 3; ++bit) position |= (column >> bit & 1) << 2 * bit | (row >> bit & 1) << (2 * bit + 1);
  return position;
}

// Mirroring a quadrant flips the column bits (5) or the row bits (10) of a position.
__device__ __forceinline__ int mirror(int quadrant) { return (quadrant & 1) * 5 | (quadrant >> 1) * 10; }

__device__ __forceinline__ void copy_async(char* to, const char* from) {
#ifdef EMULATED
  emulated_copy_async(to, from, COPY_BYTES);
#else
  if constexpr (COPY_BYTES == 2) *reinterpret_cast<unsigned short*>(to) = *reinterpret_cast<const unsigned short*>(from);
  else {
    const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (COPY_BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from));
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(place), "l"(from), "n"(COPY_BYTES));
  }
#endif
}

__device__ __forceinline__ void close_copies() {
#ifdef EMULATED
  emulated_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the newest STAGES - 1 groups of this thread's copies have arrived.
__device__ __forceinline__ void await_copies() {
#ifdef EMULATED
  emulated_wait(STAGES - 1);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
#endif
}

// What a buffer holds: samples, and the first patch of the region.
struct Stage {
  int first_sample, num_samples, row, column;
};

__device__ __forceinline__ Stage stage_of(int item, int num_samples) {
  if constexpr (REGION != 0) {
    const int region = item % (REGIONS_SIDE * REGIONS_SIDE);
    return {item / (REGIONS_SIDE * REGIONS_SIDE), 1, region / REGIONS_SIDE * REGION, region % REGIONS_SIDE * REGION};
  }
  const int first = item * SAMPLES;
  return {first, min(SAMPLES, num_samples - first), 0, 0};
}

__device__ __forceinline__ int slot_at(const short* slots, int sample, int row, int column) {
  constexpr int side = GRID_SIDE + 2 * RADIUS;
  const bool inside = static_cast<unsigned>(row) < GRID_SIDE && static_cast<unsigned>(column) < GRID_SIDE;
  return inside ? slots[static_cast<long long>(sample) * side * side + (row + RADIUS) * side + column + RADIUS] : -1;
}

__device__ constexpr int power_of_two_below(int value) { return value < 2 ? 1 : 2 * power_of_two_below(value / 2); }

// Starts the copies of a stage. A thread keeps to one piece of the rows, and to one site of the tiles where there are threads
// enough: then nothing but additions is left in its loop.
__device__ __forceinline__ void fetch(char* buffer, const Stage& stage, const Element* x, const short* slots, int num_visible) {
  constexpr int PIECES = ROW / COPY_BYTES, ROWS = THREADS / PIECES;
  constexpr int TILES = ROWS < SITES ? 1 : ROWS / SITES, STEP = ROWS < SITES ? power_of_two_below(ROWS) : SITES;
  const int piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
  const int channel = blockIdx.x * CHUNK + piece * (COPY_BYTES / ELEMENT_BYTES);
  if (row >= TILES * STEP || channel >= CHANNELS) return;
  const int num_tiles = REGION ? WIDTH * WIDTH : stage.num_samples * num_visible;
  const Element* source = x + static_cast<long long>(stage.first_sample) * num_visible * (SITES * CHANNELS) + channel;
#pragma unroll 2
  for (int tile = row / STEP; tile < num_tiles; tile += TILES) {
    int from = tile;
    if constexpr (REGION != 0) {
      from = slot_at(slots, stage.first_sample, stage.row - REACH + tile / WIDTH, stage.column - REACH + tile % WIDTH);
      if (from < 0) continue;
    }
#pragma unroll 2
    for (int site = row % STEP; site < SITES; site += STEP) {
      const int quadrant = site / QUADRANT_SITES;
      int place = site % QUADRANT_SITES;
      if constexpr (MIRRORED) place ^= mirror(quadrant);
      copy_async(buffer + tile * TILE_BYTES + quadrant * QUADRANT_BYTES + place * ROW + piece * COPY_BYTES,
                 reinterpret_cast<const char*>(source + (from * SITES + site) * CHANNELS));
    }
  }
}

// Multiplies the input sites of one tile with the taps that lead from them to the thread's outputs (rows 0 .. BLOCK - 1).
// top, left: site of the tile's corner. A convolution adds to `block`, the weight gradient to `taps`.
__device__ __forceinline__ void visit(const char* tile, int top, int left, const int (&quadrants)[4],
                                      float (&taps)[PER_LANE][TAPS], float (&block)[PER_LANE][OUTPUTS]) {
#pragma unroll
  for (int r = 0; r < SIDE; ++r) {
    const int row = top + r;
    if (row < -RADIUS || row >= BLOCK + RADIUS) continue;
#pragma unroll
    for (int c = 0; c < SIDE; ++c) {
      const int column = left + c;
      if (column < -RADIUS || column >= BLOCK + RADIUS) continue;
      float value[PER_LANE];
      if constexpr (MIRRORED) {
        const int position = morton(r < 4 ? r : 7 - r, c < 4 ? c : 7 - c);
        read(value, tile + quadrants[(r >= 4) * 2 + (c >= 4)] + position * ROW);
      } else {
        read(value, tile + morton(r, c) * ROW);
      }
#pragma unroll
      for (int i = 0; i < BLOCK; ++i) {
        if (row - i < -RADIUS || row - i > RADIUS) continue;
#pragma unroll
        for (int j = 0; j < BLOCK; ++j) {
          if (column - j < -RADIUS || column - j > RADIUS) continue;
          const int tap = (row - i + RADIUS) * TAPS_SIDE + column - j + RADIUS;
#pragma unroll
          for (int p = 0; p < PER_LANE; ++p) {
            if constexpr (OP == WEIGHT_GRADIENT) taps[p][tap] += block[p][i * BLOCK + j] * value[p];
            else block[p][i * BLOCK + j] += taps[p][tap] * value[p];
          }
        }
      }
    }
  }
}

// What a thread is: its subgroup, its first channel and that channel's place in a row of shared memory.
struct Lane {
  int subgroup, in_subgroup, channel, offset, quadrants[4];
  bool has_channel;
};

struct Arguments {
  const Element *x, *extra;  // extra: the residual or, for the weight gradient, the gradient of the output
  const short* slots;
  const long long* visible;
  Element* y;
  int num_visible;
};

// What a warp works on at a time: at s > 1 one tile per subgroup (one for all, when mirrored), at s = 1 a block of patches.
struct Unit {
  int sample, number;  // sample of the stage

  __device__ __forceinline__ void advance(int num_units) {
    number += WORKERS;
    if constexpr (SIDE == 1) {  // num_units is a constant
      sample += number / num_units;
      number %= num_units;
    }
    while (number >= num_units) {
      number -= num_units;
      ++sample;
    }
  }
};

using Taps = float[PER_LANE][TAPS];
using Block = float[PER_LANE][OUTPUTS];

// Where row i of the thread's outputs begins, in elements from the tile's first element of the thread's channel.
__device__ __forceinline__ int row_of(const Lane& lane, int i) {
  if constexpr (MIRRORED) return (lane.subgroup * 16 + (morton(i, 0) ^ (lane.subgroup & 2 ? 10 : 0))) * CHANNELS;
  return SIDE == 1 ? 0 : morton(i, 0) * CHANNELS;
}

// Swaps the columns of a mirrored block: from the order of memory to that of the subgroup's frame, or back.
__device__ __forceinline__ void turn_columns(const Lane& lane, Block& block) {
  if constexpr (!MIRRORED) return;
  const bool turned = lane.subgroup & 1;
#pragma unroll
  for (int p = 0; p < PER_LANE; ++p) {
#pragma unroll
    for (int i = 0; i < OUTPUTS; i += i % BLOCK == 1 ? BLOCK - 1 : 1) {
      const int other = i / BLOCK * BLOCK + BLOCK - 1 - i % BLOCK;
      const float here = block[p][i], there = block[p][other];
      block[p][i] = turned ? there : here;
      block[p][other] = turned ? here : there;
    }
  }
}

__device__ __forceinline__ long long first_element(const Arguments& a, const Lane& lane, int sample, int slot) {
  return (static_cast<long long>(sample) * a.num_visible + slot) * (SITES * CHANNELS) + lane.channel;
}

// Sets output i to what it starts from, or reads the gradient at it.
__device__ __forceinline__ void begin(Block& block, int i, const Element* extra, const float (&bias)[PER_LANE]) {
  float value[PER_LANE] = {};
  if (extra) read(value, extra);
#pragma unroll
  for (int p = 0; p < PER_LANE; ++p) block[p][i] = OP == FORWARD ? bias[p] : value[p];
}

__device__ __forceinline__ void store(const Block& block, int i, Element* y) {
  float value[PER_LANE];
#pragma unroll
  for (int p = 0; p < PER_LANE; ++p) value[p] = block[p][i];
  write(y, value);
}

__device__ __forceinline__ void add_to_bias(const Block& block, float (&bias)[PER_LANE]) {
#pragma unroll
  for (int p = 0; p < PER_LANE; ++p) {
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) bias[p] += block[p][i];
  }
}

#if SIDE > 1

// The tile that this lane looks up for its subgroup: lane k of a subgroup sees to neighbour k. Its patch is known a turn of
// the warp's loop ahead of its slot, and that a turn ahead of its use, so that no load is waited for.
__device__ __forceinline__ int patch_of(const Arguments& a, const Lane& lane, const Stage& stage, const Unit& unit) {
  const int index = unit.number * TILES_PER_UNIT + (MIRRORED ? 0 : lane.subgroup);
  const bool exists = unit.sample < stage.num_samples && lane.in_subgroup < NEIGHBOURS;
  if constexpr (REGION != 0) return exists && index < REGION * REGION ? index : -1;
  if (!exists || index >= a.num_visible) return -1;
  return a.visible[static_cast<long long>(stage.first_sample + unit.sample) * a.num_visible + index];
}

// The lane's place in the grid: its subgroup's patch, moved to its neighbour.
__device__ __forceinline__ void move(const Lane& lane, const Stage& stage, int patch, int& row, int& column) {
  constexpr int side = REGION ? REGION_SIDE : GRID_SIDE;
  const int k = lane.in_subgroup;
  row = stage.row + patch / side;
  column = stage.column + patch % side;
  if constexpr (MIRRORED) {
    row += lane.subgroup & 2 ? k / 2 : -(k / 2);
    column += lane.subgroup & 1 ? k % 2 : -(k % 2);
  } else {
    row += k / NEIGHBOURS_SIDE - REACH;
    column += k % NEIGHBOURS_SIDE - REACH;
  }
}

__device__ __forceinline__ int slot_of(const Arguments& a, const Lane& lane, const Stage& stage, const Unit& unit, int patch) {
  if (patch < 0) return -1;
  int row, column;
  move(lane, stage, patch, row, column);
  return slot_at(a.slots, stage.first_sample + unit.sample, row, column);
}

// Where the tile of a slot begins in shared memory. base: of the stage; the zeros lie at 0.
__device__ __forceinline__ int place_of(const Lane& lane, const Stage& stage, int base, const Unit& unit, int slot,
                                        int num_visible, int patch) {
  int number = unit.sample * num_visible + slot;
  if constexpr (REGION != 0) {
    int row, column;
    move(lane, stage, patch, row, column);
    number = (row - stage.row + REACH) * WIDTH + column - stage.column + REACH;
  }
  return slot < 0 ? 0 : base + number * TILE_BYTES;
}

__device__ __forceinline__ void compute(const Arguments& a, const Lane& lane, const char* shared, const Stage& stage, int base,
                                        const Unit& unit, int patch, int own_slot, Taps& taps, float (&bias)[PER_LANE]) {
  unsigned present = __ballot_sync(WARP, own_slot >= 0);
#pragma unroll
  for (int shift = 16; shift >= LANES; shift /= 2) present |= present >> shift;
  if (!(present >> OWN & 1)) return;
  const int own_place = place_of(lane, stage, base, unit, own_slot, a.num_visible, patch);
  const int slot = __shfl_sync(WARP, own_slot, OWN, LANES);
  const bool active = slot >= 0 && lane.has_channel;
  Block block;
#pragma unroll
  for (int i = 0; i < OUTPUTS; ++i) begin(block, i, nullptr, bias);
  if (OP >= WITH_RESIDUAL && active) {
    const Element* extra = a.extra + first_element(a, lane, stage.first_sample + unit.sample, slot);
#pragma unroll
    for (int i = 0; i < OUTPUTS; ++i) begin(block, i, extra + row_of(lane, i / BLOCK) + morton(0, i % BLOCK) * CHANNELS, bias);
    turn_columns(lane, block);
  }
#pragma unroll
  for (int k = 0; k < NEIGHBOURS; ++k) {
    if (!(present >> k & 1)) continue;
    const int top = MIRRORED ? -(k / 2) : k / NEIGHBOURS_SIDE - REACH, left = MIRRORED ? -(k % 2) : k % NEIGHBOURS_SIDE - REACH;
    const int place = __shfl_sync(WARP, own_place, k, LANES);
    visit(shared + place + lane.offset, top * SIDE, left * SIDE, lane.quadrants, taps, block);
  }
  if constexpr (OP == WEIGHT_GRADIENT) add_to_bias(block, bias);
  else {
    turn_columns(lane, block);
    if (!active) return;
    Element* y = a.y + first_element(a, lane, stage.first_sample + unit.sample, slot);
#pragma unroll
    for (int i = 0; i < BLOCK; ++i) {
      Element* row = y + row_of(lane, i);
#pragma unroll
      for (int j = 0; j < BLOCK; ++j) store(block, i * BLOCK + j, row + morton(0, j) * CHANNELS);
    }
  }
}

#else

// A block of BLOCK x BLOCK patches: every visible patch within reach is read once and reaches all outputs from there.
__device__ __forceinline__ void compute(const Arguments& a, const Lane& lane, const char* shared, const Stage& stage, int base,
                                        const Unit& unit, Taps& taps, float (&bias)[PER_LANE]) {
  constexpr int LOW = BLOCKS_SIDE == 1 ? 0 : -RADIUS, WINDOW = BLOCK - 2 * LOW;
  const int row = stage.row + unit.number / BLOCKS_SIDE * BLOCK, column = stage.column + unit.number % BLOCKS_SIDE * BLOCK;
  const int sample = stage.first_sample + unit.sample;
  int slots[WINDOW];  // of the lane's column; which columns are visible is asked row by row, registers being short
#pragma unroll
  for (int r = 0; r < WINDOW; ++r) {
    slots[r] = lane.in_subgroup < WINDOW ? slot_at(a.slots, sample, row + LOW + r, column + LOW + lane.in_subgroup) : -1;
  }
  Block block;
#pragma unroll
  for (int i = 0; i < BLOCK; ++i) {
    const unsigned present = OP >= WITH_RESIDUAL ? __ballot_sync(WARP, slots[i - LOW] >= 0) : 0;
#pragma unroll
    for (int j = 0; j < BLOCK; ++j) {
      begin(block, i * BLOCK + j, nullptr, bias);
      if (!(present >> (j - LOW) & 1)) continue;
      const int slot = __shfl_sync(WARP, slots[i - LOW], j - LOW);
      if (lane.has_channel) begin(block, i * BLOCK + j, a.extra + first_element(a, lane, sample, slot), bias);
    }
  }
#pragma unroll
  for (int r = 0; r < WINDOW; ++r) {
    const unsigned present = __ballot_sync(WARP, slots[r] >= 0);
#pragma unroll
    for (int c = 0; c < WINDOW; ++c) {
      if (!(present >> c & 1)) continue;
      int number = (r + LOW + REACH) * WIDTH + c + LOW + REACH;
      if constexpr (REGION == 0) number = unit.sample * a.num_visible + __shfl_sync(WARP, slots[r], c);
      visit(shared + base + number * TILE_BYTES + lane.offset, r + LOW, c + LOW, lane.quadrants, taps, block);
    }
  }
  if constexpr (OP == WEIGHT_GRADIENT) {
    add_to_bias(block, bias);
    return;
  }
  Element* const y = a.y + first_element(a, lane, sample, 0);
#pragma unroll
  for (int i = 0; i < BLOCK; ++i) {
    const unsigned present = __ballot_sync(WARP, slots[i - LOW] >= 0);
#pragma unroll
    for (int j = 0; j < BLOCK; ++j) {
      if (!(present >> (j - LOW) & 1)) continue;
      const int slot = __shfl_sync(WARP, slots[i - LOW], j - LOW);
      if (lane.has_channel) store(block, i * BLOCK + j, y + slot * CHANNELS);
    }
  }
}

#endif

// The tap of the weight that tap `t` of a subgroup's frame is; the input gradient takes them in reverse.
__device__ __forceinline__ int tap_of(int t, const Lane& lane) {
  int row = t / TAPS_SIDE, column = t % TAPS_SIDE;
  if (MIRRORED && lane.subgroup & 2) row = TAPS_SIDE - 1 - row;
  if (MIRRORED && lane.subgroup & 1) column = TAPS_SIDE - 1 - column;
  const int tap = row * TAPS_SIDE + column;
  return OP == FORWARD ? tap : TAPS - 1 - tap;
}

// The weights of a thread's channels, through shared memory so that global memory is read in order.
__device__ __forceinline__ void load_weights(float* staged, const Weight* weight, int in_chunk, const Lane& lane, Taps& taps) {
  const int first = blockIdx.x * CHUNK, count = min(CHUNK, CHANNELS - first) * TAPS;
  for (int i = threadIdx.x; i < count; i += THREADS) staged[i] = widen<WEIGHT>(weight[first * TAPS + i]);
  __syncthreads();
  const int row = lane.has_channel ? in_chunk * TAPS : 0;
#pragma unroll
  for (int p = 0; p < PER_LANE; ++p) {
#pragma unroll
    for (int t = 0; t < TAPS; ++t) taps[p][t] = staged[row + p * TAPS + tap_of(t, lane)];
  }
  __syncthreads();
}

// Adds up the subgroups of a warp, then its workers one after the other, and stores the CTA's sums.
__device__ __forceinline__ void store_partial(float* sums, float* partial, int in_chunk, int worker, const Lane& lane, Taps& taps,
                                              float (&bias)[PER_LANE]) {
#pragma unroll
  for (int p = 0; p < PER_LANE; ++p) {
#pragma unroll
    for (int bit = LANES; bit < 32; bit *= 2) {
      float other[TAPS];
#pragma unroll
      for (int t = 0; t < TAPS; ++t) {
        const int row = t / TAPS_SIDE, column = t % TAPS_SIDE;
        const int mirrored = bit == LANES ? row * TAPS_SIDE + 6 - column : (6 - row) * TAPS_SIDE + column;
        other[t] = __shfl_xor_sync(WARP, taps[p][MIRRORED ? mirrored : t], bit);
      }
#pragma unroll
      for (int t = 0; t < TAPS; ++t) taps[p][t] += other[t];
      bias[p] += __shfl_xor_sync(WARP, bias[p], bit);
    }
  }
  for (int turn = 0; turn < WORKERS; ++turn) {
    if (turn == worker && lane.subgroup == 0) {
#pragma unroll
      for (int p = 0; p < PER_LANE; ++p) {
        float* row = sums + (in_chunk + p) * SUMS;
#pragma unroll
        for (int t = 0; t < SUMS; ++t) row[t] = (turn ? row[t] : 0.f) + (t < TAPS ? taps[p][t] : bias[p]);
      }
    }
    __syncthreads();
  }
  const int first = blockIdx.x * CHUNK, count = min(CHUNK, CHANNELS - first) * SUMS;
  float* to = partial + (static_cast<long long>(blockIdx.y) * CHANNELS + first) * SUMS;
  for (int i = threadIdx.x; i < count; i += THREADS) to[i] = sums[i];
}

#if OP == 3
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
KERNEL(const Element* x, const Element* grad, const long long* visible, const short* slots, float* partial, int num_samples,
       int num_visible) {
  const Arguments a{x, grad, slots, visible, nullptr, num_visible};
#else
extern "C" __global__ void __launch_bounds__(THREADS, MIN_CTAS)
KERNEL(const Element* x, const Weight* weight, const Weight* bias_weight, const Element* residual, const long long* visible,
       const short* slots, Element* y, int num_samples, int num_visible) {
  const Arguments a{x, residual, slots, visible, y, num_visible};
#endif
  DYNAMIC_SHARED;
  const int warp = __shfl_sync(WARP, threadIdx.x / 32, 0);  // the same for all lanes, and known to be
  const int in_warp = threadIdx.x % 32, group = warp % GROUPS, worker = warp / GROUPS;
  Lane lane;
  lane.subgroup = in_warp / LANES;
  lane.in_subgroup = in_warp % LANES;
  const int in_chunk = group * GROUP_CHANNELS + lane.in_subgroup * PER_LANE;
  lane.channel = blockIdx.x * CHUNK + in_chunk;
  lane.has_channel = lane.channel < CHANNELS;
  lane.offset = in_chunk * ELEMENT_BYTES;
#pragma unroll
  for (int q = 0; q < 4; ++q) lane.quadrants[q] = (lane.subgroup ^ q) * QUADRANT_BYTES;

  Taps taps = {};
  float bias[PER_LANE] = {};
#if OP != 3
  load_weights(reinterpret_cast<float*>(shared), weight, in_chunk, lane, taps);
  if (OP == FORWARD && lane.has_channel) {
    for (int p = 0; p < PER_LANE; ++p) bias[p] = widen<WEIGHT>(bias_weight[lane.channel + p]);
  }
#endif
  for (int i = threadIdx.x; i < ZERO_BYTES / 4; i += THREADS) reinterpret_cast<float*>(shared)[i] = 0.f;

  const int num_items = REGION ? num_samples * REGIONS_SIDE * REGIONS_SIDE : (num_samples + SAMPLES - 1) / SAMPLES;
  const int num_units = SIDE == 1 ? (REGION ? 1 : BLOCKS_SIDE * BLOCKS_SIDE)
                                  : ((REGION ? REGION * REGION : num_visible) + TILES_PER_UNIT - 1) / TILES_PER_UNIT;
  const int stage_bytes = (REGION ? WIDTH * WIDTH : SAMPLES * num_visible) * TILE_BYTES;
  // STAGES - 1 stages are on their way while one is computed; stage number `turn` of this CTA lies in buffer turn % STAGES.
#pragma unroll
  for (int turn = 0; turn < STAGES - 1; ++turn) {
    const int item = blockIdx.y + turn * gridDim.y;
    if (item < num_items) fetch(shared + ZERO_BYTES + turn * stage_bytes, stage_of(item, num_samples), x, slots, num_visible);
    close_copies();
  }
  int turn = 0;
  for (int item = blockIdx.y; item < num_items; item += gridDim.y, ++turn) {
    const int ahead = item + (STAGES - 1) * gridDim.y;
    if (ahead < num_items) {
      char* buffer = shared + ZERO_BYTES + (turn + STAGES - 1) % STAGES * stage_bytes;
      fetch(buffer, stage_of(ahead, num_samples), x, slots, num_visible);
    }
    close_copies();
    const int base = ZERO_BYTES + turn % STAGES * stage_bytes;
    const Stage stage = stage_of(item, num_samples);
    Unit unit{0, worker - WORKERS};
    unit.advance(num_units);
#if SIDE > 1
    Unit next = unit;
    next.advance(num_units);
    int patch = patch_of(a, lane, stage, unit), next_patch = patch_of(a, lane, stage, next);
    int slot = slot_of(a, lane, stage, unit, patch);
#endif
    await_copies();
    __syncthreads();
    while (unit.sample < stage.num_samples) {
#if SIDE > 1
      const int next_slot = slot_of(a, lane, stage, next, next_patch);
      Unit later = next;
      later.advance(num_units);
      const int later_patch = patch_of(a, lane, stage, later);
      compute(a, lane, shared, stage, base, unit, patch, slot, taps, bias);
      unit = next;
      patch = next_patch;
      slot = next_slot;
      next = later;
      next_patch = later_patch;
#else
      compute(a, lane, shared, stage, base, unit, taps, bias);
      unit.advance(num_units);
#endif
    }
    __syncthreads();
  }
#if OP == 3
  store_partial(reinterpret_cast<float*>(shared), partial, in_chunk, worker, lane, taps, bias);
#endif
}

#endif
