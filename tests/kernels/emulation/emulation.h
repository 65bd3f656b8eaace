// CUDA C++ on a CPU, for one kernel at a time: every thread of a CTA is a fiber, CTAs run one after the other.
//
// A fiber runs until it reaches a barrier or an operation of its warp. Shared memory is filled with NaN and exactly as long as
// the launch says; asynchronous copies happen no sooner than they are waited for; threads run in order or, asked for, in
// reverse: a missing barrier or wait shows as NaN or as a difference.
#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define EMULATED 1
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DYNAMIC_SHARED char* const shared = emulated::shared_memory

namespace emulated {

struct Index {
  int x, y, z;
};

enum State { READY, AT_BARRIER, IN_WARP, DONE };
enum Operation { BALLOT, SHUFFLE };

struct Copy {
  char* to;
  const char* from;
  int bytes, group;
};

constexpr size_t STACK_BYTES = 64 << 10;

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started;
  State state;
  Operation operation;
  unsigned value, answer;
  int source;
  std::vector<Copy> copies;
  int num_groups;
};

static std::vector<Fiber> fibers;
static char* stacks;
static ucontext_t scheduler;
static jmp_buf scheduler_jump;
static int current;
static char* shared_memory;
static void (*body)();
static const char* failure;

// The first failure ends the launch, which hands it back.
inline void fail(const char* message) {
  if (!failure) failure = message;
}

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer has to be told of every change of stacks, and follows `swapcontext` only.
static const void* scheduler_stack;
static size_t scheduler_stack_bytes;

inline void leave() {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(fibers[current].state == DONE ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fibers[current].context, &scheduler);
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
}

inline void enter() {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stacks + current * STACK_BYTES, STACK_BYTES);
  swapcontext(&scheduler, &fibers[current].context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

inline void entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  body();
  fibers[current].state = DONE;
  leave();
}
#else
// `swapcontext` asks the kernel for the signal mask at every turn; jumps do not.
inline void leave() {
  if (!_setjmp(fibers[current].jump)) _longjmp(scheduler_jump, 1);
}

inline void enter() {
  if (_setjmp(scheduler_jump)) return;
  if (fibers[current].started) _longjmp(fibers[current].jump, 1);
  fibers[current].started = true;
  setcontext(&fibers[current].context);
}

inline void entry() {
  body();
  fibers[current].state = DONE;
  _longjmp(scheduler_jump, 1);
}
#endif

inline void finish_warp(int first) {
  Fiber* lanes = &fibers[first];
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) {
    if (lanes[i].operation != lanes[0].operation) fail("lanes of a warp are at different operations");
    ballot |= (lanes[i].value != 0u) << i;
  }
  for (int i = 0; i < 32; ++i) {
    lanes[i].answer = lanes[i].operation == BALLOT ? ballot : lanes[lanes[i].source].value;
    lanes[i].state = READY;
  }
}

inline void run_cta(int num_threads, bool reversed) {
  int num_done = 0;
  while (num_done < num_threads) {
    bool moved = false;
    for (int w = 0; w < num_threads / 32; ++w) {
      const int first = 32 * (reversed ? num_threads / 32 - 1 - w : w);
      for (;;) {
        int in_warp = 0;
        for (int i = 0; i < 32; ++i) {
          current = first + (reversed ? 31 - i : i);
          if (fibers[current].state == READY) {
            enter();
            moved = true;
            num_done += fibers[current].state == DONE;
          }
          in_warp += fibers[current].state == IN_WARP;
        }
        if (in_warp == 0) break;
        if (in_warp < 32) fail("an operation of a warp without all of its lanes");
        if (failure) return;
        finish_warp(first);
      }
    }
    int waiting = 0;
    for (int i = 0; i < num_threads; ++i) waiting += fibers[i].state == AT_BARRIER;
    if (waiting > 0 && waiting + num_done == num_threads) {
      for (int i = 0; i < num_threads; ++i) {
        if (fibers[i].state == AT_BARRIER) fibers[i].state = READY;
      }
    } else if (!moved) {
      fail("no thread can go on");
    }
    if (failure) return;
  }
}

template <class T> inline unsigned to_bits(T value) {
  static_assert(sizeof(T) == 4);
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class T> inline T exchange(T value, int source) {
  Fiber& self = fibers[current];
  self.operation = SHUFFLE;
  self.value = to_bits(value);
  self.source = source;
  self.state = IN_WARP;
  leave();
  T result;
  std::memcpy(&result, &fibers[current].answer, 4);
  return result;
}

}  // namespace emulated

static emulated::Index block_index, block_size, grid_size;
#define threadIdx (emulated::Index{emulated::current, 0, 0})
#define blockIdx block_index
#define gridDim grid_size
#define blockDim block_size

inline void __syncthreads() {
  emulated::fibers[emulated::current].state = emulated::AT_BARRIER;
  emulated::leave();
}

inline unsigned __ballot_sync(unsigned, bool value) {
  emulated::Fiber& self = emulated::fibers[emulated::current];
  self.operation = emulated::BALLOT;
  self.value = value;
  self.state = emulated::IN_WARP;
  emulated::leave();
  return emulated::fibers[emulated::current].answer;
}

template <class T> inline T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  const int self = emulated::current % 32;
  return emulated::exchange(value, self / width * width + lane % width);
}

template <class T> inline T __shfl_xor_sync(unsigned, T value, int bits) {
  return emulated::exchange(value, emulated::current % 32 ^ bits);
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// One fiber runs at a time.
inline float atomicAdd(float* to, float value) {
  const float before = *to;
  *to += value;
  return before;
}

inline int min(int a, int b) { return a < b ? a : b; }

inline float emulated_half_to_float(unsigned short bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
}

inline unsigned short emulated_float_to_half(float value) {
  const _Float16 narrow = value;
  unsigned short bits;
  std::memcpy(&bits, &narrow, 2);
  return bits;
}

inline unsigned short emulated_float_to_bfloat16(float value) {
  const unsigned bits = emulated::to_bits(value);
  return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline void emulated_copy_async(char* to, const char* from, int bytes) {
  using namespace emulated;
  if ((reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from)) % bytes) fail("a copy is not aligned to its width");
  if (bytes == 2) std::memcpy(to, from, bytes);
  else fibers[current].copies.push_back({to, from, bytes, fibers[current].num_groups});
}

inline void emulated_commit() { ++emulated::fibers[emulated::current].num_groups; }

inline void emulated_wait(int newest) {
  using namespace emulated;
  Fiber& self = fibers[current];
  std::vector<Copy> later;
  for (const Copy& copy : self.copies) {
    if (copy.group < self.num_groups - newest) std::memcpy(copy.to, copy.from, copy.bytes);
    else later.push_back(copy);
  }
  self.copies.swap(later);
}

namespace emulated {

static void* const* arguments;

template <class... A, size_t... I>
void call(void (*kernel)(A...), std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A> void call(void (*kernel)(A...)) { call(kernel, std::index_sequence_for<A...>{}); }

inline const char* launch(const int* grid, int num_threads, int shared_bytes, bool reversed, void* const* args, void (*kernel_body)()) {
  failure = nullptr;
  arguments = args;
  body = kernel_body;
  block_size = {num_threads, 1, 1};
  grid_size = {grid[0], grid[1], grid[2]};
  fibers = std::vector<Fiber>(num_threads);
  stacks = static_cast<char*>(std::malloc(num_threads * STACK_BYTES));
  for (block_index.z = 0; block_index.z < grid[2] && !failure; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid[1] && !failure; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid[0]; ++block_index.x) {
        shared_memory = static_cast<char*>(std::aligned_alloc(16, (shared_bytes + 15) / 16 * 16));
        std::memset(shared_memory, 0xff, shared_bytes);
        for (int i = 0; i < num_threads; ++i) {
          Fiber& fiber = fibers[i];
          fiber.started = false;
          fiber.state = READY;
          fiber.num_groups = 0;
          fiber.copies.clear();
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = stacks + i * STACK_BYTES;
          fiber.context.uc_stack.ss_size = STACK_BYTES;
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, entry, 0);
        }
        run_cta(num_threads, reversed);
        std::free(shared_memory);
        if (failure) break;
      }
  std::free(stacks);
  return failure;
}

}  // namespace emulated

#define EMULATED_LAUNCH(kernel, name)                                                                                       \
  extern "C" const char* name(const int* grid, int num_threads, int shared_bytes, int reversed, void* const* args) {     \
    return emulated::launch(grid, num_threads, shared_bytes, reversed, args, [] { emulated::call(kernel); });                        \
  }
