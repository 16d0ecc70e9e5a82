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
#include <unordered_map>
#include <vector>

#include "emulator/global_memory.h"
#include "emulator/records.h"
#include "emulator/shared_memory.h"

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

// Without a request by cudaFuncSetAttribute, as platform.h makes in allow_shared_bytes; and with
// it.
constexpr size_t kMaxSharedBytes = 48 * 1024;
constexpr size_t kMaxAllowedSharedBytes = 227 * 1024;
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
  // index: among all fibers.
  explicit Fiber(size_t index) : colour_(index * kColourBytes % kColours) {
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
    void** top = reinterpret_cast<void**>(bottom + kStackBytes - colour_) - 8;
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
    finish_switch(self->fake_stack_, nullptr);
  }

  // The same to a fiber that has paused.
  static void pause_for(Fiber& other) {
    Fiber* const self = current_;
    current_ = &other;
    start_switch(&self->fake_stack_, {other.memory_ + kGuardBytes, kStackBytes});
    resnet_fused_switch_stack(&self->stack_pointer_, other.stack_pointer_);
    finish_switch(self->fake_stack_, nullptr);
  }

 private:
  static constexpr size_t kGuardBytes = 4096;
  static constexpr size_t kStackBytes = 256 * 1024;
  // Where stacks begin, so that those of a warp do not all compete for the same lines of the cache.
  static constexpr size_t kColourBytes = 9 * 64;
  static constexpr size_t kColours = 64 * 64;

  [[noreturn]] static void main();

  static inline Fiber* current_ = nullptr;
  static inline void* scheduler_stack_pointer_ = nullptr;
  static inline StackBounds scheduler_bounds_;

  // Between threads: back to the scheduler, which may be on another stack when it resumes.
  static void pause_at_end() {
    Fiber* const self = current_;
    start_switch(&self->fake_stack_, scheduler_bounds_);
    resnet_fused_switch_stack(&self->stack_pointer_, scheduler_stack_pointer_);
    finish_switch(self->fake_stack_, &scheduler_bounds_);
  }

  size_t colour_;
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
  const CollectiveCall* call = nullptr;
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

// A cheap shuffle of 2^n numbers.
class Order {
 public:
  Order() = default;
  explicit Order(Random& random) {
    const uint64_t bits = random();
    factor_ = (bits & 0xffff) | 1;
    offset_ = bits >> 16 & 0xffff;
    flip_ = bits >> 32;
  }
  uint64_t operator()(uint64_t i, uint64_t size) const {
    return ((i * factor_ + offset_) ^ flip_) & (size - 1);
  }

 private:
  uint64_t factor_ = 1;
  uint64_t offset_ = 0;
  uint64_t flip_ = 0;
};

// Calls visit(i) for each i < n, in an order drawn from `random`.
template <class Visit>
void for_each_shuffled(uint64_t n, Random& random, Visit&& visit) {
  const uint64_t size = std::bit_ceil(n);
  const Order order(random);
  for (uint64_t i = 0; i < size; ++i) {
    const uint64_t j = order(i, size);
    if (j < n) visit(j);
  }
}

// The lanes of the warp that runs, each once in a round, up to where they wait.
struct Round {
  Thread* lanes = nullptr;
  unsigned count = 0;
  Order order;
  unsigned position = 0;
  // The first collective that a lane has come to, and how many lanes have come to the same.
  const CollectiveCall* call = nullptr;
  int lanes_at_call = 0;
};

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
  Random random{0};
  Round round;
  // By kernel.
  std::unordered_map<const void*, size_t> allowed_shared_bytes;

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
  return std::string("(") + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
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

std::string to_string(const SharedAccess& access) {
  const bool is_element = access.array != nullptr;
  return (is_element ? "element " : "byte ") + std::to_string(access.index) + " of " +
         (is_element ? access.array : "the dynamic shared memory");
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
      check_copies_landed();
    } catch (const std::exception& error) {
      s.error = error.what();
    }
    s.threads[current_thread].state = State::kEnded;
    pause_at_end();
  }
}

void enter(Scheduler& s, const Thread& thread) {
  current_thread = static_cast<unsigned>(&thread - s.threads.data());
  threadIdx = thread.index;
}

// Until it, or one that has taken over from it, has to wait for the scheduler or ends.
void resume(Scheduler& s, Thread& thread) {
  if (thread.fiber == nullptr) {
    if (s.free_fibers.empty()) {
      s.fibers.push_back(std::make_unique<Fiber>(s.fibers.size()));
      s.free_fibers.push_back(s.fibers.back().get());
    }
    thread.fiber = s.free_fibers.back();
    s.free_fibers.pop_back();
  }
  enter(s, thread);
  thread.fiber->resume();
  if (!s.error.empty()) [[unlikely]] {
    throw std::runtime_error(s.error);
  }
  Thread& last = s.threads[current_thread];
  if (last.state == State::kEnded) {
    s.free_fibers.push_back(last.fiber);
    last.fiber = nullptr;
  }
}

bool is_same(const Site& a, const Site& b) {
  static_assert(sizeof(Site) == sizeof(void*));
  if (std::bit_cast<const void*>(a) == std::bit_cast<const void*>(b)) return true;
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string whereabouts(const Thread& thread) {
  switch (thread.state) {
    case State::kAtBarrier:
      return to_string(thread) + " waits in __syncthreads at " + to_string(thread.site);
    case State::kAtCollective:
      return to_string(thread) + " waits in " + thread.call->name + " at " + to_string(thread.site);
    default:
      return to_string(thread) + " has ended";
  }
}

bool is_same(const CollectiveCall& a, const CollectiveCall& b) {
  return is_same(a.site, b.site) && a.operation == b.operation;
}

void begin_round(Scheduler& s) {
  s.round.order = Order(s.random);
  s.round.position = 0;
  s.round.call = nullptr;
  s.round.lanes_at_call = 0;
}

// The next lane of the round that can go on, if there is one.
Thread* next_lane(Round& round) {
  while (round.position < kWarpSize) {
    const uint64_t lane = round.order(round.position++, kWarpSize);
    if (lane < round.count && round.lanes[lane].state == State::kReady) return round.lanes + lane;
  }
  return nullptr;
}

// With all lanes of the warp at the same collective.
void complete_collective(Scheduler& s) {
  Thread* const lanes = s.round.lanes;
  const CollectiveCall& any = *lanes[0].call;
  switch (any.kind) {
    case Collective::kSyncwarp:
      ++warp_phases[warp_of(static_cast<unsigned>(lanes - s.threads.data()))];
      break;
    case Collective::kShuffle:
      for (int i = 0; i < kWarpSize; ++i) {
        lanes[i].result = lanes[lanes[i].call->source_lane].call->value;
      }
      break;
    case Collective::kBallot: {
      uint64_t ballot = 0;
      for (int i = 0; i < kWarpSize; ++i) ballot |= uint64_t{lanes[i].call->value != 0} << i;
      for (int i = 0; i < kWarpSize; ++i) lanes[i].result = ballot;
      break;
    }
    case Collective::kOperation: {
      std::array<void*, kWarpSize> arguments;
      for (int i = 0; i < kWarpSize; ++i) arguments[i] = lanes[i].call->argument;
      enter(s, lanes[0]);
      any.operation(arguments.data(), any.site);
      break;
    }
  }
  for (int i = 0; i < kWarpSize; ++i) lanes[i].state = State::kReady;
}

// With every lane of the warp waiting or ended, and at least one at a collective.
[[noreturn]] void fail_collective(const Round& round) {
  const Thread* const end = round.lanes + round.count;
  const Thread& first =
      *std::find_if(round.lanes, round.lanes + round.count,
                    [](const Thread& lane) { return lane.state == State::kAtCollective; });
  const auto other = std::find_if(round.lanes, round.lanes + round.count, [&](const Thread& lane) {
    return lane.state != State::kAtCollective || !is_same(*lane.call, *first.call);
  });
  if (other != end) {
    fail("divergent warp collective: " + whereabouts(first) + ", but " + whereabouts(*other));
  }
  fail(std::string(first.call->name) + " at " + to_string(first.site) +
       " is called by a warp of only " + std::to_string(round.count) + " threads");
}

// Runs a warp until all its threads wait for those of other warps, or have ended.
void run_warp(Scheduler& s, unsigned warp) {
  const unsigned begin = warp * kWarpSize;
  s.round.lanes = &s.threads[begin];
  s.round.count = std::min<unsigned>(kWarpSize, static_cast<unsigned>(s.threads.size()) - begin);
  for (;;) {
    begin_round(s);
    while (Thread* const lane = next_lane(s.round)) resume(s, *lane);
    if (s.round.call == nullptr) return;
    if (s.round.lanes_at_call != kWarpSize) fail_collective(s.round);
    complete_collective(s);
  }
}

// Called by a thread in whose way something is: lets the others go on until it is out of the way.
// Mostly they hand over to each other, which is cheaper than to let the scheduler choose.
void wait(Scheduler& s, Thread& self) {
  for (;;) {
    Thread* const next = next_lane(s.round);
    if (next == nullptr && s.round.lanes_at_call == kWarpSize) {
      complete_collective(s);
      begin_round(s);
    } else if (next == &self) {
      enter(s, self);
      return;
    } else if (next != nullptr && next->fiber != nullptr) {
      enter(s, *next);
      Fiber::pause_for(*next->fiber);
      return;
    } else {
      if (next != nullptr) --s.round.position;
      Fiber::pause();
      return;
    }
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

void run_block(Scheduler& s) {
  for (Thread& thread : s.threads) thread.state = State::kReady;
  first_phase_of_block = ++phase;
  const unsigned warps = static_cast<unsigned>(s.threads.size() + kWarpSize - 1) / kWarpSize;
  for (;;) {
    for_each_shuffled(warps, s.random,
                      [&](uint64_t warp) { run_warp(s, static_cast<unsigned>(warp)); });
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

size_t max_shared_bytes(const Scheduler& s, const Launch& launch) {
  const auto allowed = s.allowed_shared_bytes.find(launch.address);
  return allowed == s.allowed_shared_bytes.end() ? kMaxSharedBytes : kMaxAllowedSharedBytes;
}

void check_launch(const Scheduler& s, const Launch& launch) {
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
  const auto allowed = s.allowed_shared_bytes.find(launch.address);
  if (allowed == s.allowed_shared_bytes.end()) {
    check(launch.dynamic_shared_bytes <= kMaxSharedBytes,
          "more than 48 KiB of shared memory, which allow_shared_bytes has not allowed");
  } else {
    check(launch.dynamic_shared_bytes <= allowed->second,
          "more shared memory than allow_shared_bytes has allowed");
  }
}

void prepare(Scheduler& s, const Launch& launch) {
  const dim3& block = launch.block;
  s.threads.assign(size_t{block.x} * block.y * block.z, Thread());
  for (unsigned i = 0; i < s.threads.size(); ++i) {
    s.threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  prepare_shared_memory(launch.dynamic_shared_bytes);
}

}  // namespace

void run(const Launch& launch, void (*body)(void*), void* context) {
  Scheduler& s = scheduler();
  const std::lock_guard lock(s.mutex);
  check_launch(s, launch);
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
  s.random = Random(s.seed);
  try {
    const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    for_each_shuffled(blocks, s.random, [&](uint64_t i) {
      blockIdx = block_index(i);
      enter_block(i);
      run_block(s);
    });
    const size_t limit = max_shared_bytes(s, launch);
    if (counters.static_shared_bytes + launch.dynamic_shared_bytes > limit) {
      fail("uses more than " + std::to_string(limit / 1024) + " KiB of shared memory");
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
  Scheduler& s = scheduler();
  Thread& thread = s.threads[current_thread];
  thread.site = site;
  thread.state = State::kAtBarrier;
  wait(s, thread);
}

uint64_t collective(const CollectiveCall& call) {
  if (call.mask != kFullMask) [[unlikely]] {
    fail_in_thread(std::string("calls ") + call.name + " at " + to_string(call.site) +
                   " for a part of its warp, which is not emulated");
  }
  Scheduler& s = scheduler();
  Thread& thread = s.threads[current_thread];
  thread.site = call.site;
  thread.call = &call;
  thread.state = State::kAtCollective;
  if (s.round.call == nullptr) s.round.call = &call;
  s.round.lanes_at_call += is_same(call, *s.round.call);
  wait(s, thread);
  return thread.result;
}

void allow_shared_bytes(const void* kernel, size_t bytes) {
  if (bytes > kMaxAllowedSharedBytes) {
    throw std::runtime_error("allow_shared_bytes: " + std::to_string(bytes) +
                             " bytes are more than the 227 KiB that a block can have");
  }
  Scheduler& s = scheduler();
  const std::lock_guard lock(s.mutex);
  s.allowed_shared_bytes[kernel] = bytes;
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
  fail_in_thread("reads uninitialised shared memory, " + to_string(access) + ", at " +
                 to_string(access.site) + ": no thread of the block has written it so far");
}

void fail_in_flight(const SharedAccess& access, const char* what, const Stamp& copy) {
  fail_in_thread(std::string(what) + " " + to_string(access) + " at " + to_string(access.site) +
                 " while a cp.async started at " + to_string(copy.site) + " by " +
                 to_string(scheduler().threads[copy.thread]) + " is in flight");
}

void fail_end_with_copies(Site site) {
  fail_in_thread("ends while copies are in flight: it has not waited for the cp.async started at " +
                 to_string(site));
}

void fail_shared_alignment(const char* what, uint32_t address, size_t bytes, Site site) {
  fail_in_thread("makes a misaligned " + std::to_string(bytes) + "-byte " + what +
                 " of shared address " + std::to_string(address) + " at " + to_string(site));
}

void fail_shared_range(const char* what, uint32_t offset, size_t bytes, Site site) {
  fail_in_thread("makes a " + std::to_string(bytes) + "-byte " + what + " of " +
                 to_string(SharedAccess{nullptr, static_cast<int>(offset), site}) + ", which has " +
                 std::to_string(dynamic_memory.size) + ", at " + to_string(site));
}

void fail_race(const SharedAccess& access, const char* what, const char* what_before,
               unsigned thread_before, Site site_before) {
  fail_in_thread("races through shared memory: it " + std::string(what) + " " + to_string(access) +
                 " at " + to_string(access.site) + ", which " +
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
