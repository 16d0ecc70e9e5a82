// Runs CUDA kernels on the CPU. Stands in for the CUDA half of cuda/platform.h when a .cu file is
// compiled with RESNET_FUSED_EMULATE, and finds what a GPU would turn into rare wrong results:
// races through shared and global memory, uninitialised shared memory, barriers that not every
// thread reaches, misaligned accesses, copies that are used before anyone has waited for them.
//
// Every CUDA thread is a fiber; blocks run one after the other, in an order drawn from a seed like
// that of the warps and lanes within them. So a kernel that waits for another block never ends
// here. Stricter than a GPU: warp collectives are for whole warps, barriers for threads that have
// not ended, and of the collectives only __syncwarp orders accesses to memory, as CUDA's guide has
// it.
#pragma once

#ifndef __x86_64__
#error "the emulator switches between fibers with x86-64 instructions"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#ifndef RESNET_FUSED_NAMESPACE
#define RESNET_FUSED_NAMESPACE resnet_fused_emulated
#endif
#define RESNET_FUSED_DISPATCH_KEY CPU
#define RESNET_FUSED_LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                                       \
   ::resnet_fused::emulator::launch(kernel, #kernel, dim3(grid), dim3(block),       \
                                    dynamic_shared_bytes __VA_OPT__(, ) __VA_ARGS__))

// A shared array of `count` elements, the same one for all threads of a block.
#define RESNET_FUSED_SHARED(T, name, count)                                         \
  static constinit ::resnet_fused::emulator::StaticShared<T, count> name##_storage; \
  const ::resnet_fused::SharedArray<T> name = name##_storage.array(#name)

// The launch's dynamic shared memory as elements of T.
#define RESNET_FUSED_DYNAMIC_SHARED(T, name) \
  const ::resnet_fused::SharedArray<T> name = ::resnet_fused::emulator::dynamic_shared<T>(#name)

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
constexpr int2 make_int2(int x, int y) { return {x, y}; }
constexpr int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;

// Of the running thread.
inline constinit uint3 threadIdx{}, blockIdx{};
inline constinit dim3 blockDim, gridDim;

namespace resnet_fused {
namespace emulator {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = ~0u;
constexpr int kMaxThreads = 1024;

using Site = std::source_location;

struct Counters {
  int64_t bytes_read = 0;
  int64_t bytes_written = 0;
  // Of 1, 2, 4, 8 and 16 bytes.
  std::array<int64_t, 5> accesses{};
  int64_t atomics = 0;
  int64_t barriers = 0;
  int64_t static_shared_bytes = 0;
  // Of global memory, each counted once however often it was accessed.
  int64_t distinct_bytes_read = 0;
  int64_t distinct_bytes_written = 0;
  // Instructions of the tensor cores, each for a 16x8 tile; and how often the eight rows of a
  // matrix that a warp loads had to wait for each other.
  int64_t products = 0;
  int64_t bank_conflicts = 0;
};
inline constinit Counters counters;

// Position of the running thread, and what orders its accesses to shared memory: the number of the
// interval between two barriers (never used twice, so that shared memory need not be cleared for
// the next block), and for each warp the number of __syncwarp in that interval.
inline constinit unsigned current_thread = 0;
inline constinit uint32_t phase = 1;
inline constinit uint32_t first_phase_of_block = 1;
inline constinit std::array<uint32_t, kMaxThreads / kWarpSize> warp_phases{};
inline constinit uint64_t launch_number = 0;

// Who accessed an element of shared memory, when and where.
struct Stamp {
  Site site;
  uint32_t phase = 0;
  uint32_t warp_phase = 0;
  unsigned thread = 0;
};

// What is remembered of a piece of shared memory. Of the readers: the last one, the last other lane
// of its warp, and the last one of another warp. If any reader is unordered with a later writer,
// one of these is.
struct Cell {
  Stamp writer;
  Stamp reader;
  Stamp reader_of_other_lane;
  Stamp reader_of_other_warp;
  // The writer is a cp.async that it has not waited for.
  bool is_in_flight = false;
};

// Of an element of an array, or without a name of a byte of the dynamic shared memory.
struct SharedAccess {
  const char* array;
  int index;
  Site site;
};

// Each ends the thread and with it the launch, with an error that names kernel, thread and block.
[[noreturn]] void fail_alignment(const char* what, const void* address, size_t bytes, Site site);
[[noreturn]] void fail_index(const SharedAccess& access, int count);
[[noreturn]] void fail_uninitialised(const SharedAccess& access);
[[noreturn]] void fail_in_flight(const SharedAccess& access, const char* what, const Stamp& copy);
[[noreturn]] void fail_race(const SharedAccess& access, const char* what, const char* what_before,
                            unsigned thread_before, Site site_before);

inline unsigned warp_of(unsigned thread) { return thread / kWarpSize; }

// Whether nothing orders the running thread's access after an earlier one.
inline bool is_unordered(const Stamp& before) {
  if (before.phase != phase || before.thread == current_thread) return false;
  const unsigned warp = warp_of(current_thread);
  return warp_of(before.thread) != warp || before.warp_phase == warp_phases[warp];
}

inline Stamp stamp(Site site) {
  return {site, phase, warp_phases[warp_of(current_thread)], current_thread};
}

inline void check_read(Cell& cell, const SharedAccess& access) {
  if (cell.is_in_flight) [[unlikely]] {
    fail_in_flight(access, "reads", cell.writer);
  }
  if (cell.writer.phase < first_phase_of_block) [[unlikely]] {
    fail_uninitialised(access);
  }
  if (is_unordered(cell.writer)) [[unlikely]] {
    fail_race(access, "reads", "written", cell.writer.thread, cell.writer.site);
  }
  if (cell.reader.thread != current_thread) {
    const bool same_warp = warp_of(cell.reader.thread) == warp_of(current_thread);
    (same_warp ? cell.reader_of_other_lane : cell.reader_of_other_warp) = cell.reader;
  }
  cell.reader = stamp(access.site);
}

inline void check_write(Cell& cell, const SharedAccess& access) {
  if (cell.is_in_flight) [[unlikely]] {
    fail_in_flight(access, "writes", cell.writer);
  }
  if (is_unordered(cell.writer)) [[unlikely]] {
    fail_race(access, "writes", "written", cell.writer.thread, cell.writer.site);
  }
  for (const Stamp* reader :
       {&cell.reader, &cell.reader_of_other_lane, &cell.reader_of_other_warp}) {
    if (is_unordered(*reader)) [[unlikely]] {
      fail_race(access, "writes", "read", reader->thread, reader->site);
    }
  }
  cell.writer = stamp(access.site);
}

// Find races through global memory: see global_memory.h.
void on_load(const void* p, size_t bytes, Site site);
void on_store(const void* p, size_t bytes, Site site);
void on_fence();
void on_atomic();

// Requires what makes a load or store of V a single instruction on a GPU.
template <class V>
constexpr void check_access_type() {
  static_assert(std::is_trivially_copyable_v<V>);
  static_assert(sizeof(V) <= 16 && std::has_single_bit(sizeof(V)));
  static_assert(alignof(V) == sizeof(V), "would be split into narrower accesses");
}

template <class V>
inline void count_access(const char* what, const V* p, Site site) {
  check_access_type<V>();
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) [[unlikely]] {
    fail_alignment(what, p, sizeof(V), site);
  }
  ++counters.accesses[std::countr_zero(sizeof(V))];
}

template <class Integer>
inline Integer atomic_add(Integer* p, Integer value, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Integer) != 0) [[unlikely]] {
    fail_alignment("atomic access", p, sizeof(Integer), site);
  }
  ++counters.atomics;
  on_atomic();
  const Integer before = *p;
  *p = before + value;
  return before;
}

enum class Collective : uint8_t { kSyncwarp, kShuffle, kBallot, kOperation };

// What a warp does at once, with an argument of each lane. Called for one lane, with current_thread
// that of lane 0, which it may change.
using WarpOperation = void (*)(void* const* arguments, Site site);

struct CollectiveCall {
  Collective kind;
  const char* name;
  Site site;
  unsigned mask = kFullMask;
  uint64_t value = 0;
  unsigned source_lane = 0;
  WarpOperation operation = nullptr;
  void* argument = nullptr;
};

void barrier(Site site);
// Returns, once all lanes have called it: the value of source_lane, or the lanes whose value is not
// 0, or nothing.
uint64_t collective(const CollectiveCall& call);

template <class T>
inline T shuffle(const char* name, unsigned mask, T value, int source_lane, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective({.kind = Collective::kShuffle,
                     .name = name,
                     .site = site,
                     .mask = mask,
                     .value = bits,
                     .source_lane = static_cast<unsigned>(source_lane)});
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int current_lane() { return static_cast<int>(current_thread % kWarpSize); }

struct Launch {
  const char* kernel;
  const void* address;
  dim3 grid;
  dim3 block;
  size_t dynamic_shared_bytes;
};

// Calls body(context) once for every thread. Throws std::runtime_error on the first mistake.
void run(const Launch& launch, void (*body)(void*), void* context);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block,
            size_t dynamic_shared_bytes, Arguments... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {arguments...}};
  const auto body = [](void* context) {
    const auto* call = static_cast<const Call*>(context);
    std::apply(call->kernel, call->parameters);
  };
  run({name, reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared_bytes}, body,
      &call);
}

// Lets later launches of the kernel have up to so much dynamic shared memory.
void allow_shared_bytes(const void* kernel, size_t bytes);

}  // namespace emulator

// A view of shared memory: elements are only ever loaded and stored, so that each access is seen.
template <class T>
class SharedArray {
 public:
  SharedArray(const char* name, std::byte* bytes, emulator::Cell* cells, int cells_per_element,
              int count)
      : name_(name),
        bytes_(bytes),
        cells_(cells),
        cells_per_element_(cells_per_element),
        count_(count) {}

  T load(int i, emulator::Site site = emulator::Site::current()) const {
    const emulator::SharedAccess access = check_index(i, site);
    for (int j = 0; j < cells_per_element_; ++j) check_read(cell(i, j), access);
    T value;
    std::memcpy(static_cast<void*>(&value), bytes_ + i * sizeof(T), sizeof(T));
    return value;
  }

  void store(int i, T value, emulator::Site site = emulator::Site::current()) const {
    const emulator::SharedAccess access = check_index(i, site);
    for (int j = 0; j < cells_per_element_; ++j) check_write(cell(i, j), access);
    std::memcpy(bytes_ + i * sizeof(T), &value, sizeof(T));
  }

 private:
  emulator::SharedAccess check_index(int i, emulator::Site site) const {
    static_assert(std::is_trivially_copyable_v<T>);
    const emulator::SharedAccess access{name_, i, site};
    if (i < 0 || i >= count_) [[unlikely]] {
      emulator::fail_index(access, count_);
    }
    return access;
  }

  emulator::Cell& cell(int i, int j) const { return cells_[i * cells_per_element_ + j]; }

  const char* name_;
  std::byte* bytes_;
  emulator::Cell* cells_;
  int cells_per_element_;
  int count_;
};

namespace emulator {

template <class T, int kCount>
struct StaticShared {
  alignas(16) std::byte bytes[sizeof(T) * kCount]{};
  Cell cells[kCount]{};
  uint64_t last_launch = 0;

  SharedArray<T> array(const char* name) {
    if (last_launch != launch_number) {
      last_launch = launch_number;
      counters.static_shared_bytes += sizeof(bytes);
    }
    return {name, bytes, cells, 1, kCount};
  }
};

// Kernels may divide their dynamic shared memory among types of different size, so it is watched
// in pieces of 2 bytes; see shared_memory.h.
constexpr int kDynamicCellBytes = 2;

struct DynamicShared {
  std::byte* bytes = nullptr;
  Cell* cells = nullptr;
  size_t size = 0;
};
inline constinit DynamicShared dynamic_memory;

// From now on to the end of the launch nothing is watched in larger pieces.
void watch_cells();

template <class T>
SharedArray<T> dynamic_shared(const char* name) {
  static_assert(sizeof(T) % kDynamicCellBytes == 0);
  watch_cells();
  return {name, dynamic_memory.bytes, dynamic_memory.cells, sizeof(T) / kDynamicCellBytes,
          static_cast<int>(dynamic_memory.size / sizeof(T))};
}

}  // namespace emulator

// Global memory: one access of sizeof(V) bytes.
template <class V>
inline V load(const V* p, emulator::Site site = emulator::Site::current()) {
  emulator::count_access("load", p, site);
  emulator::counters.bytes_read += sizeof(V);
  emulator::on_load(p, sizeof(V), site);
  return *p;
}

template <class V>
inline void store(V* p, std::type_identity_t<V> value,
                  emulator::Site site = emulator::Site::current()) {
  emulator::count_access("store", p, site);
  emulator::counters.bytes_written += sizeof(V);
  emulator::on_store(p, sizeof(V), site);
  *p = value;
}

template <class Kernel>
void allow_shared_bytes(Kernel* kernel, size_t bytes) {
  emulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline bool is_kernel_device(const torch::stable::Tensor& t) { return t.is_cpu(); }

inline cudaStream_t current_stream(const torch::stable::Tensor&) { return nullptr; }

// As set by the operator `configure`.
int multiprocessor_count(int device);

// That of an H100, of which allow_shared_bytes lets a launch have no more.
inline int64_t most_shared_bytes(int) { return 227 * 1024; }

inline void zero_async(void* p, size_t bytes, cudaStream_t) { std::memset(p, 0, bytes); }

}  // namespace resnet_fused

inline void __syncthreads(
    resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  resnet_fused::emulator::barrier(site);
}

inline void __syncwarp(
    unsigned mask = resnet_fused::emulator::kFullMask,
    resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  using namespace resnet_fused::emulator;
  collective({.kind = Collective::kSyncwarp, .name = "__syncwarp", .site = site, .mask = mask});
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane,
                     resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  using namespace resnet_fused::emulator;
  return shuffle("__shfl_sync", mask, value, lane & (kWarpSize - 1), site);
}

template <class T>
inline T __shfl_xor_sync(
    unsigned mask, T value, int lane_mask,
    resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  using namespace resnet_fused::emulator;
  return shuffle("__shfl_xor_sync", mask, value, (current_lane() ^ lane_mask) & (kWarpSize - 1),
                 site);
}

template <class T>
inline T __shfl_down_sync(
    unsigned mask, T value, unsigned delta,
    resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  using namespace resnet_fused::emulator;
  const int lane = current_lane() + static_cast<int>(delta);
  return shuffle("__shfl_down_sync", mask, value, lane < kWarpSize ? lane : current_lane(), site);
}

template <class T>
inline T __shfl_up_sync(
    unsigned mask, T value, unsigned delta,
    resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  using namespace resnet_fused::emulator;
  const int lane = current_lane() - static_cast<int>(delta);
  return shuffle("__shfl_up_sync", mask, value, lane >= 0 ? lane : current_lane(), site);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate,
    resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  using namespace resnet_fused::emulator;
  return static_cast<unsigned>(collective({.kind = Collective::kBallot,
                                           .name = "__ballot_sync",
                                           .site = site,
                                           .mask = mask,
                                           .value = predicate != 0}));
}

inline int __popc(unsigned value) { return std::popcount(value); }

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }

inline void __threadfence() { resnet_fused::emulator::on_fence(); }

inline int atomicAdd(int* p, int value,
                     resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  return resnet_fused::emulator::atomic_add(p, value, site);
}

inline unsigned atomicAdd(
    unsigned* p, unsigned value,
    resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  return resnet_fused::emulator::atomic_add(p, value, site);
}

inline unsigned atomicInc(
    unsigned* p, unsigned limit,
    resnet_fused::emulator::Site site = resnet_fused::emulator::Site::current()) {
  const unsigned before = resnet_fused::emulator::atomic_add(p, 0u, site);
  *p = before >= limit ? 0 : before + 1;
  return before;
}
