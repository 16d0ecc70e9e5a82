// Small kernels that use all of cuda/ptx.cuh. test_emulated_tensor_cores.py runs them as they are
// here, and breaks them one line at a time.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <type_traits>

#include "common/checks.h"
#include "common/dispatch.h"
#include "cuda/platform.h"
#include "cuda/ptx.cuh"

namespace resnet_fused {
namespace {

using ptx::SharedAddress;

constexpr int kWarp = 32;
constexpr int kChunkBytes = 16;

// ---- A matrix product ----

constexpr int kWarps = 2;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRows = 16 * kWarps;  // of a block's tile of the result
constexpr int kColumns = 16;
constexpr int kPitch = 2 * kChunkBytes;  // of a row in shared memory: as much as a product takes
constexpr int kStages = 3;
constexpr int kOffsetOfB = kRows * kPitch;
constexpr int kStageBytes = kOffsetOfB + kColumns * kPitch;

// Any 8 neighbouring rows have the same chunk in 8 different groups of banks.
__device__ inline int at(int row, int chunk) {
  return row * kPitch + (chunk ^ (row >> 2 & 1)) * kChunkBytes;
}

// In global memory; outside of it are zeros.
struct Matrix {
  const void* data;
  int rows, chunks;

  __device__ void copy(SharedAddress to, int row, int chunk) const {
    const bool exists = row < rows && chunk < chunks;
    ptx::copy_async(to, ptx::offset<kChunkBytes>(data, row * chunks + chunk), exists);
  }
};

// (m, n) = a @ b with a (m, k) and b (n, k), or b (k, n) where kTransposed.
template <class T, bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    product_kernel(Matrix a, Matrix b, float* __restrict__ result, int m, int n, int steps) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarp;
  const int warp = thread / kWarp;
  const int first_row = static_cast<int>(blockIdx.x) * kRows;
  const int first_column = static_cast<int>(blockIdx.y) * kColumns;
  const SharedAddress shared = ptx::dynamic_shared();
  const auto copy = [&](int step, int stage) {
    const int row = thread / 2, chunk = thread % 2;
    const SharedAddress to = shared + stage * kStageBytes + at(row, chunk);
    a.copy(to, first_row + row, 2 * step + chunk);
    if (row >= kColumns) return;
    if constexpr (kTransposed) {
      b.copy(to + kOffsetOfB, 16 * step + row, first_column / 8 + chunk);
    } else {
      b.copy(to + kOffsetOfB, first_column + row, 2 * step + chunk);
    }
  };

  for (int stage = 0; stage < kStages; ++stage) {
    copy(stage, stage);
    ptx::commit_copies();  // first
  }
  float sum[1][2][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages;
    ptx::wait_for_copies<kStages - 1>();
    __syncthreads();  // copied
    const SharedAddress from = shared + stage * kStageBytes;
    uint32_t fragment_a[1][4], pair[4];
    ptx::load_matrices(fragment_a[0], from + at(16 * warp + lane % 16, lane / 16));
    if constexpr (kTransposed) {
      ptx::load_matrices_transposed(pair, from + kOffsetOfB + at(lane % 16, lane / 16));
    } else {
      ptx::load_matrices(pair, from + kOffsetOfB + at(lane % 8 + lane / 16 * 8, lane / 8 % 2));
    }
    const uint32_t fragment_b[2][2] = {{pair[0], pair[1]}, {pair[2], pair[3]}};
    __syncthreads();  // read
    copy(step + kStages, stage);
    ptx::commit_copies();  // later
    if constexpr (kTransposed) {
      for (int j = 0; j < 2; ++j) {
        ptx::multiply_add_tile<T>(sum[0][j], fragment_a[0], fragment_b[j]);
      }
    } else {
      ptx::multiply_add<T>(sum, fragment_a, fragment_b);
    }
  }
  ptx::wait_for_copies<0>();

  for (int j = 0; j < 2; ++j) {
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * warp + 8 * half + lane / 4;
      const int column = first_column + 8 * j + lane % 4 * 2;
      if (row >= m || column >= n) continue;
      store(reinterpret_cast<float2*>(result + row * n + column),
            make_float2(sum[0][j][2 * half], sum[0][j][2 * half + 1]));
    }
  }
}

// a, b: rows of whole chunks. n: even.
void product_cuda(const Tensor& a, const Tensor& b, const Tensor& out, bool transposed) {
  const auto matrix = [](const Tensor& t) {
    const auto row_bytes = static_cast<int>(t.size(1) * t.element_size());
    return Matrix{t.const_data_ptr(), static_cast<int>(t.size(0)), row_bytes / kChunkBytes};
  };
  const int m = static_cast<int>(out.size(0)), n = static_cast<int>(out.size(1));
  const int steps = (matrix(a).chunks + 1) / 2;
  const dim3 grid((m + kRows - 1) / kRows, (n + kColumns - 1) / kColumns);
  const auto launch = [&]<class T, bool kTransposed>() {
    RESNET_FUSED_LAUNCH((product_kernel<T, kTransposed>), grid, kThreads, kStages * kStageBytes,
                        current_stream(a), matrix(a), matrix(b),
                        static_cast<float*>(out.mutable_data_ptr()), m, n, steps);
  };
  dispatch_up_to_float32("product", "a", a.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, float>) {
      launch.template operator()<ptx::Tf32, false>();
    } else if (transposed) {
      launch.template operator()<T, true>();
    } else {
      launch.template operator()<T, false>();
    }
  });
}

// ---- Loads of matrices from any address ----

__global__ void __launch_bounds__(kWarp)
    fragments_kernel(const uint4* __restrict__ x, const int* __restrict__ rows,
                     uint4* __restrict__ result, int chunks, bool transposed) {
  const SharedAddress shared = ptx::dynamic_shared();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < chunks; i += kWarp) {
    ptx::store_shared(shared + i * kChunkBytes, load(x + i));
  }
  __syncwarp();
  const SharedAddress row = shared + load(rows + lane);
  uint32_t fragment[4];
  if (transposed) {
    ptx::load_matrices_transposed(fragment, row);
  } else {
    ptx::load_matrices(fragment, row);
  }
  store(result + lane, make_uint4(fragment[0], fragment[1], fragment[2], fragment[3]));
}

// rows: where in the bytes of x the row of each lane is. out: 16 bytes of each lane.
void fragments_cuda(const Tensor& x, const Tensor& rows, const Tensor& out, bool transposed) {
  const auto bytes = static_cast<size_t>(x.numel() * x.element_size());
  RESNET_FUSED_LAUNCH(fragments_kernel, 1, kWarp, bytes, current_stream(x),
                      static_cast<const uint4*>(x.const_data_ptr()),
                      static_cast<const int*>(rows.const_data_ptr()),
                      static_cast<uint4*>(out.mutable_data_ptr()),
                      static_cast<int>(bytes / kChunkBytes), transposed);
}

// ---- Accesses of every width to the same shared memory ----

constexpr int kValues = 4 * kWarp;
constexpr int kHalves = kChunkBytes / 2;  // of 16 bits, in a chunk

// All 16-bit halves of kValues numbers in reverse. kArray: through a view of the memory, too.
template <bool kArray>
__global__ void __launch_bounds__(kValues)
    halves_kernel(const float* __restrict__ x, uint4* __restrict__ result) {
  const SharedAddress shared = ptx::dynamic_shared();
  const SharedAddress reversed = shared + kWarp * kChunkBytes;
  const int thread = static_cast<int>(threadIdx.x);
  const float value = load(x + thread);
  if constexpr (kArray) {
    RESNET_FUSED_DYNAMIC_SHARED(float, values);
    values.store(thread, value);
  } else {
    ptx::store_shared(shared + thread * 4, value);
  }
  __syncthreads();  // values
  if (thread >= kWarp) return;
  const auto chunk = ptx::load_shared<uint4>(shared + thread * kChunkBytes);
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  for (int i = 0; i < kHalves; ++i) {
    const int to = kHalves * (kWarp - thread) - 1 - i;
    ptx::store_shared(reversed + 2 * to, static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
  }
  __syncwarp();
  // By way of a copy in one piece of what was written in many.
  const auto whole = ptx::load_shared<uint4>(reversed + thread * kChunkBytes);
  ptx::store_shared(reversed + thread * kChunkBytes, whole);
  __syncwarp();
  const SharedAddress first = reversed + (thread ^ 1) * kChunkBytes;
  const auto low = ptx::load_shared<uint2>(first), high = ptx::load_shared<uint2>(first + 8);
  store(result + (thread ^ 1), make_uint4(low.x, low.y, high.x, high.y));
}

void halves_cuda(const Tensor& x, const Tensor& out, bool array) {
  const auto launch = [&]<bool kArray>() {
    RESNET_FUSED_LAUNCH(halves_kernel<kArray>, 1, kValues, 2 * kWarp * kChunkBytes,
                        current_stream(x), static_cast<const float*>(x.const_data_ptr()),
                        static_cast<uint4*>(out.mutable_data_ptr()));
  };
  if (array) {
    launch.template operator()<true>();
  } else {
    launch.template operator()<false>();
  }
}

// ---- Conversions ----

template <class T, bool kRelu>
struct Pack {
  using From = float2;
  using To = uint32_t;
  static __device__ uint32_t apply(float2 x) {
    return kRelu ? ptx::pack_relu<T>(x.x, x.y) : ptx::pack<T>(x.x, x.y);
  }
};

template <class T>
struct Unpack {
  using From = uint32_t;
  using To = float2;
  static __device__ float2 apply(uint32_t x) { return ptx::unpack<T>(x); }
};

struct RoundToTf32 {
  using From = float;
  using To = uint32_t;
  static __device__ uint32_t apply(float x) { return ptx::round_to_tf32(x); }
};

template <class Conversion>
__global__ void __launch_bounds__(kThreads)
    convert_kernel(const typename Conversion::From* __restrict__ x,
                   typename Conversion::To* __restrict__ result, int n) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i < n) store(result + i, Conversion::apply(load(x + i)));
}

template <class Conversion>
void convert(const Tensor& x, const Tensor& out) {
  using From = typename Conversion::From;
  using To = typename Conversion::To;
  const auto n = static_cast<int>(x.numel() * x.element_size() / sizeof(From));
  RESNET_FUSED_LAUNCH(convert_kernel<Conversion>, (n + kThreads - 1) / kThreads, kThreads, 0,
                      current_stream(x), static_cast<const From*>(x.const_data_ptr()),
                      static_cast<To*>(out.mutable_data_ptr()), n);
}

// From float32 to the dtype of out. n: even.
void pack_cuda(const Tensor& x, const Tensor& out, bool relu) {
  const bool is_half = out.scalar_type() == ScalarType::Half;
  if (relu) {
    is_half ? convert<Pack<ptx::Half, true>>(x, out) : convert<Pack<ptx::BFloat16, true>>(x, out);
  } else {
    is_half ? convert<Pack<ptx::Half, false>>(x, out) : convert<Pack<ptx::BFloat16, false>>(x, out);
  }
}

void unpack_cuda(const Tensor& x, const Tensor& out) {
  const bool is_half = x.scalar_type() == ScalarType::Half;
  is_half ? convert<Unpack<ptx::Half>>(x, out) : convert<Unpack<ptx::BFloat16>>(x, out);
}

void round_to_tf32_cuda(const Tensor& x, const Tensor& out) { convert<RoundToTf32>(x, out); }

// ---- Any bytes of global memory ----

template <class V>
__device__ inline void touch(const uint8_t* from, uint8_t* to, int first) {
  store(reinterpret_cast<V*>(to + first), load(reinterpret_cast<const V*>(from + first)));
}

// accesses: (first byte, number of bytes) of each.
__global__ void touch_kernel(const uint8_t* __restrict__ from, uint8_t* __restrict__ to,
                             const int2* __restrict__ accesses, int n) {
  for (int i = 0; i < n; ++i) {
    const int2 access = load(accesses + i);
    if (access.y == 1) touch<uint8_t>(from, to, access.x);
    if (access.y == 2) touch<uint16_t>(from, to, access.x);
    if (access.y == 4) touch<uint32_t>(from, to, access.x);
    if (access.y == 8) touch<uint2>(from, to, access.x);
    if (access.y == 16) touch<uint4>(from, to, access.x);
  }
}

void touch_cuda(const Tensor& from, const Tensor& to, const Tensor& accesses) {
  RESNET_FUSED_LAUNCH(touch_kernel, 1, 1, 0, current_stream(from),
                      static_cast<const uint8_t*>(from.const_data_ptr()),
                      static_cast<uint8_t*>(to.mutable_data_ptr()),
                      static_cast<const int2*>(accesses.const_data_ptr()),
                      static_cast<int>(accesses.size(0)));
}

// ---- As much shared memory as wanted ----

constexpr int kStaticWords = 4;

__global__ void reach_kernel(float* result, int bytes) {
  RESNET_FUSED_SHARED(float, factor, kStaticWords);
  const SharedAddress last = ptx::dynamic_shared() + bytes - 4;
  factor.store(0, 2);
  ptx::store_shared(last, load(result));
  store(result, factor.load(0) * ptx::load_shared<float>(last));
}

// Doubles a number. allowed: bytes, or 0 to ask for nothing.
void reach_cuda(const Tensor& out, int64_t bytes, int64_t allowed) {
  if (allowed != 0) allow_shared_bytes(reach_kernel, static_cast<size_t>(allowed));
  RESNET_FUSED_LAUNCH(reach_kernel, 1, 1, static_cast<size_t>(bytes), current_stream(out),
                      static_cast<float*>(out.mutable_data_ptr()), static_cast<int>(bytes));
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_FRAGMENT(RESNET_FUSED_NAMESPACE, m) {
  m.def("product(Tensor a, Tensor b, Tensor(a!) out, bool transposed) -> ()");
  m.def("fragments(Tensor x, Tensor rows, Tensor(a!) out, bool transposed) -> ()");
  m.def("halves(Tensor x, Tensor(a!) out, bool array) -> ()");
  m.def("pack(Tensor x, Tensor(a!) out, bool relu) -> ()");
  m.def("unpack(Tensor x, Tensor(a!) out) -> ()");
  m.def("round_to_tf32(Tensor x, Tensor(a!) out) -> ()");
  m.def("touch(Tensor x, Tensor(a!) out, Tensor accesses) -> ()");
  m.def("reach(Tensor(a!) out, int bytes, int allowed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("product", TORCH_BOX(&resnet_fused::product_cuda));
  m.impl("fragments", TORCH_BOX(&resnet_fused::fragments_cuda));
  m.impl("halves", TORCH_BOX(&resnet_fused::halves_cuda));
  m.impl("pack", TORCH_BOX(&resnet_fused::pack_cuda));
  m.impl("unpack", TORCH_BOX(&resnet_fused::unpack_cuda));
  m.impl("round_to_tf32", TORCH_BOX(&resnet_fused::round_to_tf32_cuda));
  m.impl("touch", TORCH_BOX(&resnet_fused::touch_cuda));
  m.impl("reach", TORCH_BOX(&resnet_fused::reach_cuda));
}
