// The scheduler of the emulator: fibers, blocks, barriers and warp collectives.
#include "emulator/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/global_memory.h"
#include "emulator/records.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a call keeps, and the stack pointer in *from; goes on at `to`.
extern "C" __attribute__((visibility("hidden"))) void resnet_fused_switch_stack(void** from,
                                                                                void* to);
asm(R"(
.text
.hidden resnet_fused_switch_stack
.globl resnet_fused_switch_stack
.type resnet_fused_switch_stack, @function
resnet_fused_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size resnet_fused_switch_stack, . - resnet_fused_switch_stack
)");

namespace resnet_fused::emulator {
namespace {

// Without a request by cudaFuncSetAttribute, which platform.h does not make.
constexpr size_t kMaxSharedBytes = 48 * 1024;
constexpr unsigned kMaxGridYZ = 65535;

struct StackBounds {
  const void* bottom = nullptr;
  size_t size = 0;
};

#ifdef __SANITIZE_ADDRESS__
void start_switch(void** fake_stack, const StackBounds& to) {
  __sanitizer_start_switch_fiber(fake_stack, to.bottom, to.size);
}
void finish_switch(void* fake_stack, StackBounds* from) {
  __sanitizer_finish_switch_fiber(fake_stack, from ? &from->bottom : nullptr,
                                  from ? &from->size : nullptr);
}
#else
void start_switch(void**, const StackBounds&) {}
void finish_switch(void*, StackBounds*) {}
#endif

// A stack on which one thread after the other runs its kernel. A thread that ends without having
// waited leaves its fiber to the next one, so a block without barriers needs only one.
class Fiber {
 public:
  Fiber() {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // An overflow ends in a segmentation fault, not in another thread's stack.
    mprotect(memory, kGuardBytes, PROT_NONE);
    memory_ = static_cast<std::byte*>(memory);
    reset();
  }
  ~Fiber() { munmap(memory_, kGuardBytes + kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // To the state before the first resume(); what ran on the stack is abandoned.
  void reset() {
    std::byte* bottom = memory_ + kGuardBytes;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(bottom, kStackBytes);
#endif
    fake_stack_ = nullptr;
    // Six registers, the address to return to, and a return address of none above it.
    void** top = reinterpret_cast<void**>(bottom + kStackBytes) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(&Fiber::main);
    stack_pointer_ = top;
  }

  // Runs the fiber until it pauses. Called by the scheduler.
  void resume() {
    current_ = this;
    void* fake_stack = nullptr;
    start_switch(&fake_stack, {memory_ + kGuardBytes, kStackBytes});
    resnet_fused_switch_stack(&scheduler_stack_pointer_, stack_pointer_);
    finish_switch(fake_stack, nullptr);
  }

  // Back to the scheduler. Called by what runs on a fiber.
  static void pause() {
    Fiber* const self = current_;
    start_switch(&self->fake_stack_, scheduler_bounds_);
    resnet_fused_switch_stack(&self->stack_pointer_, scheduler_stack_pointer_);
    finish_switch(self->fake_stack_, &scheduler_bounds_);
  }

 private:
  static constexpr size_t kGuardBytes = 4096;
  static constexpr size_t kStackBytes = 256 * 1024;

  [[noreturn]] static void main();

  static inline Fiber* current_ = nullptr;
  static inline void* scheduler_stack_pointer_ = nullptr;
  static inline StackBounds scheduler_bounds_;

  std::byte* memory_ = nullptr;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;
};

enum class State : uint8_t { kReady, kAtBarrier, kAtCollective, kEnded };

struct Thread {
  State state = State::kReady;
  Fiber* fiber = nullptr;
  uint3 index{};
  // Where it waits.
  Site site;
  CollectiveCall call{};
  uint64_t result = 0;
};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  // splitmix64
  uint64_t operator()() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

// A cheap shuffle: calls visit(i) for each i < n, in an order drawn from `random`.
template <class Visit>
void for_each_shuffled(uint64_t n, Random& random, Visit&& visit) {
  const uint64_t size = std::bit_ceil(n);
  const uint64_t bits = random();
  const uint64_t factor = (bits & 0xffff) | 1, offset = bits >> 16 & 0xffff, flip = bits >> 32;
  for (uint64_t i = 0; i < size; ++i) {
    const uint64_t j = ((i * factor + offset) ^ flip) & (size - 1);
    if (j < n) visit(j);
  }
}

struct Settings {
  uint64_t seed = 0;
  int multiprocessors = 3;
};

struct Scheduler {
  // Launches from several threads of the process take turns.
  std::mutex mutex;
  Settings settings;
  std::vector<LaunchRecord> records;

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> free_fibers;
  std::vector<Thread> threads;
  std::vector<Cell> dynamic_cells;
  std::unique_ptr<std::byte[]> dynamic_bytes;

  const Launch* launch = nullptr;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  uint64_t seed = 0;
  std::string error;
};

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

std::string to_string(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string to_string(const void* address) {
  char text[2 + 16 + 1];
  std::snprintf(text, sizeof(text), "%p", address);
  return text;
}

std::string to_string(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}

std::string to_string(const Thread& thread) { return "thread " + to_string(thread.index); }

uint3 block_index(uint64_t i) {
  return {static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
          static_cast<unsigned>(i / gridDim.x / gridDim.y)};
}

// "(kernel<T>)", as written in a launch, -> "kernel<T>"
std::string kernel_name(std::string text) {
  const bool wrapped = text.size() > 2 && text.front() == '(' && text.back() == ')';
  return wrapped ? text.substr(1, text.size() - 2) : text;
}

// Only to be called with a launch under way.
[[noreturn]] void fail(const std::string& what) {
  const Scheduler& s = scheduler();
  throw std::runtime_error(kernel_name(s.launch->kernel) + ": " + what + " [block " +
                           to_string(blockIdx) + ", seed " + std::to_string(s.seed) + "]");
}

[[noreturn]] void fail_in_thread(const std::string& what) {
  fail(to_string(scheduler().threads[current_thread]) + " " + what);
}

void Fiber::main() {
  finish_switch(nullptr, &scheduler_bounds_);
  Scheduler& s = scheduler();
  for (;;) {
    // Exceptions cannot cross to the scheduler's stack.
    try {
      s.body(s.context);
    } catch (const std::exception& error) {
      s.error = error.what();
    }
    s.threads[current_thread].state = State::kEnded;
    pause();
  }
}

void resume(Scheduler& s, unsigned t) {
  Thread& thread = s.threads[t];
  if (thread.fiber == nullptr) {
    if (s.free_fibers.empty()) {
      s.fibers.push_back(std::make_unique<Fiber>());
      s.free_fibers.push_back(s.fibers.back().get());
    }
    thread.fiber = s.free_fibers.back();
    s.free_fibers.pop_back();
  }
  current_thread = t;
  threadIdx = thread.index;
  thread.fiber->resume();
  if (!s.error.empty()) [[unlikely]] {
    throw std::runtime_error(s.error);
  }
  if (thread.state == State::kEnded) {
    s.free_fibers.push_back(thread.fiber);
    thread.fiber = nullptr;
  }
}

bool is_same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string whereabouts(const Thread& thread) {
  switch (thread.state) {
    case State::kAtBarrier:
      return to_string(thread) + " waits in __syncthreads at " + to_string(thread.site);
    case State::kAtCollective:
      return to_string(thread) + " waits in " + thread.call.name + " at " + to_string(thread.site);
    default:
      return to_string(thread) + " has ended";
  }
}

// With every lane of the warp waiting or ended, and at least one at a collective.
void complete_collective(Scheduler& s, unsigned begin, unsigned end) {
  Thread* const lanes = &s.threads[begin];
  const unsigned count = end - begin;
  const Thread& first = *std::find_if(
      lanes, lanes + count, [](const Thread& t) { return t.state == State::kAtCollective; });
  for (unsigned i = 0; i < count; ++i) {
    if (lanes[i].state != State::kAtCollective || !is_same(lanes[i].site, first.site)) {
      fail("divergent warp collective: " + whereabouts(first) + ", but " + whereabouts(lanes[i]));
    }
  }
  if (count < kWarpSize) {
    fail(std::string(first.call.name) + " at " + to_string(first.site) +
         " is called by a warp of only " + std::to_string(count) + " threads");
  }
  uint64_t ballot = 0;
  for (unsigned i = 0; i < count; ++i) ballot |= uint64_t{lanes[i].call.value != 0} << i;
  for (unsigned i = 0; i < count; ++i) {
    const CollectiveCall& call = lanes[i].call;
    lanes[i].result =
        call.kind == Collective::kShuffle ? lanes[call.source_lane].call.value : ballot;
    lanes[i].state = State::kReady;
  }
  if (first.call.kind == Collective::kSyncwarp) ++warp_phases[warp_of(begin)];
}

// Runs a warp until all its threads wait for those of other warps, or have ended.
void run_warp(Scheduler& s, unsigned warp, Random& random) {
  const unsigned begin = warp * kWarpSize;
  const unsigned end = std::min<unsigned>(begin + kWarpSize, s.threads.size());
  for (;;) {
    bool is_at_collective = false;
    for_each_shuffled(end - begin, random, [&](uint64_t lane) {
      Thread& thread = s.threads[begin + lane];
      if (thread.state == State::kReady) resume(s, static_cast<unsigned>(begin + lane));
      is_at_collective |= thread.state == State::kAtCollective;
    });
    if (!is_at_collective) return;
    complete_collective(s, begin, end);
  }
}

// Whether all threads have ended; else all wait at the same barrier.
bool check_barrier(const Scheduler& s) {
  const Thread& first = s.threads.front();
  for (const Thread& thread : s.threads) {
    if (thread.state != first.state ||
        (thread.state == State::kAtBarrier && !is_same(thread.site, first.site))) {
      const bool swap = first.state == State::kEnded;
      fail("divergent barrier: " + whereabouts(swap ? thread : first) + ", but " +
           whereabouts(swap ? first : thread));
    }
  }
  return first.state == State::kEnded;
}

void run_block(Scheduler& s, Random& random) {
  for (Thread& thread : s.threads) thread.state = State::kReady;
  first_phase_of_block = ++phase;
  const unsigned warps = static_cast<unsigned>(s.threads.size() + kWarpSize - 1) / kWarpSize;
  for (;;) {
    for_each_shuffled(warps, random,
                      [&](uint64_t warp) { run_warp(s, static_cast<unsigned>(warp), random); });
    if (check_barrier(s)) return;
    for (Thread& thread : s.threads) thread.state = State::kReady;
    ++counters.barriers;
    ++phase;
  }
}

// After an error: threads that wait will never go on.
void abandon_threads(Scheduler& s) {
  s.free_fibers.clear();
  for (const auto& fiber : s.fibers) {
    fiber->reset();
    s.free_fibers.push_back(fiber.get());
  }
}

void check_launch(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const auto check = [&](bool condition, const char* what) {
    if (!condition) {
      throw std::runtime_error(kernel_name(launch.kernel) + ": launched with " + what);
    }
  };
  check(grid.x > 0 && grid.y > 0 && grid.z > 0, "an empty grid");
  check(grid.x <= INT32_MAX, "more than 2^31 - 1 blocks");
  check(grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ, "more than 65535 blocks in y or z");
  check(block.x > 0 && block.y > 0 && block.z > 0, "empty blocks");
  check(uint64_t{block.x} * block.y * block.z <= kMaxThreads, "more than 1024 threads per block");
  check(launch.dynamic_shared_bytes <= kMaxSharedBytes, "more than 48 KiB of shared memory");
}

void prepare(Scheduler& s, const Launch& launch) {
  const dim3& block = launch.block;
  s.threads.assign(size_t{block.x} * block.y * block.z, Thread());
  for (unsigned i = 0; i < s.threads.size(); ++i) {
    s.threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  const size_t cells = launch.dynamic_shared_bytes / kDynamicCellBytes;
  if (s.dynamic_cells.size() < cells) {
    s.dynamic_cells.resize(cells);
    s.dynamic_bytes = std::make_unique<std::byte[]>(launch.dynamic_shared_bytes);
  }
  dynamic_memory = {s.dynamic_bytes.get(), s.dynamic_cells.data(), launch.dynamic_shared_bytes};
}

}  // namespace

void run(const Launch& launch, void (*body)(void*), void* context) {
  Scheduler& s = scheduler();
  const std::lock_guard lock(s.mutex);
  check_launch(launch);
  prepare(s, launch);
  s.launch = &launch;
  s.body = body;
  s.context = context;
  s.seed = s.settings.seed++;
  s.error.clear();
  counters = {};
  ++launch_number;
  forget_global_stores(static_cast<unsigned>(s.threads.size()));
  gridDim = launch.grid;
  blockDim = launch.block;
  Random random(s.seed);
  try {
    const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    for_each_shuffled(blocks, random, [&](uint64_t i) {
      blockIdx = block_index(i);
      enter_block(i);
      run_block(s, random);
    });
    if (counters.static_shared_bytes + launch.dynamic_shared_bytes > kMaxSharedBytes) {
      fail("uses more than 48 KiB of shared memory");
    }
  } catch (...) {
    abandon_threads(s);
    throw;
  }
  s.records.push_back(
      {kernel_name(launch.kernel), launch.grid, launch.block,
       counters.static_shared_bytes + static_cast<int64_t>(launch.dynamic_shared_bytes), counters});
}

void barrier(Site site) {
  Thread& thread = scheduler().threads[current_thread];
  thread.site = site;
  thread.state = State::kAtBarrier;
  Fiber::pause();
}

uint64_t collective(const CollectiveCall& call) {
  if (call.mask != kFullMask) [[unlikely]] {
    fail_in_thread(std::string("calls ") + call.name + " at " + to_string(call.site) +
                   " for a part of its warp, which is not emulated");
  }
  Thread& thread = scheduler().threads[current_thread];
  thread.site = call.site;
  thread.call = call;
  thread.state = State::kAtCollective;
  Fiber::pause();
  return thread.result;
}

void fail_alignment(const char* what, const void* address, size_t bytes, Site site) {
  fail_in_thread("makes a misaligned " + std::to_string(bytes) + "-byte " + what + " of address " +
                 to_string(address) + " at " + to_string(site));
}

void fail_index(const SharedAccess& access, int count) {
  fail_in_thread("accesses shared element " + std::to_string(access.index) + " of " + access.array +
                 ", which has " + std::to_string(count) + ", at " + to_string(access.site));
}

void fail_uninitialised(const SharedAccess& access) {
  fail_in_thread("reads uninitialised shared memory, element " + std::to_string(access.index) +
                 " of " + access.array + ", at " + to_string(access.site) +
                 ": no thread of the block has written it so far");
}

void fail_race(const SharedAccess& access, const char* what, const char* what_before,
               unsigned thread_before, Site site_before) {
  fail_in_thread("races through shared memory: it " + std::string(what) + " element " +
                 std::to_string(access.index) + " of " + access.array + " at " +
                 to_string(access.site) + ", which " +
                 to_string(scheduler().threads[thread_before]) + " has " + what_before + " at " +
                 to_string(site_before) + " with no barrier between");
}

void fail_global_race(const GlobalRace& race) {
  fail_in_thread("races through global memory: it " + std::string(race.what) + " address " +
                 to_string(race.address) + " at " + to_string(race.site) + ", which " +
                 to_string(scheduler().threads[race.thread_before]) + " of block " +
                 to_string(block_index(race.block_before)) + " has written at " +
                 to_string(race.site_before) + " " + race.why);
}

void configure(uint64_t seed, int multiprocessors) {
  Scheduler& s = scheduler();
  const std::lock_guard lock(s.mutex);
  s.settings = {seed, multiprocessors};
}

std::vector<LaunchRecord> take_records() {
  Scheduler& s = scheduler();
  const std::lock_guard lock(s.mutex);
  return std::exchange(s.records, {});
}

}  // namespace resnet_fused::emulator

int resnet_fused::multiprocessor_count(int) {
  auto& s = emulator::scheduler();
  const std::lock_guard lock(s.mutex);
  return s.settings.multiprocessors;
}
