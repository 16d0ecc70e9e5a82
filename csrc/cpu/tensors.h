// Tensors as the CPU launchers see them: checked, allocated, and cut into matrices for the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "common/allocate.h"
#include "common/checks.h"
#include "common/dispatch.h"
#include "cpu/kernels.h"

namespace resnet_fused::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements that make up for waking another thread.
constexpr int64_t kGrain = 16384;

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  DType dtype = kFloat32;
  dispatch_floating(op, name, t.scalar_type(), [&](auto element) {
    using T = decltype(element);
    dtype = std::is_same_v<T, float>                         ? kFloat32
            : std::is_same_v<T, double>                      ? kFloat64
            : std::is_same_v<T, torch::headeronly::BFloat16> ? kBFloat16
                                                             : kFloat16;
  });
  return dtype;
}

inline Tensor empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                            torch::headeronly::IntHeaderOnlyArrayRef strides, int32_t dtype) {
  return resnet_fused::empty_strided(sizes, strides, dtype, aoti_torch_device_type_cpu(), 0);
}

inline Tensor allocate_like(const Tensor& t) {
  return empty_strided(t.sizes(), t.strides(), dtype_code(t));
}

inline Tensor empty_vector(int64_t length, int32_t dtype) {
  const int64_t stride = 1;
  return empty_strided({&length, 1}, {&stride, 1}, dtype);
}

template <class A>
int32_t arithmetic_dtype_code() {
  return std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline void check_4d(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " must be a 4-d tensor (N, C, H, W), got shape ",
                  to_string(x.sizes()));
  STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, " must be on the CPU (move it there)");
  check_dense(op, name, x);
}

inline void check_channels(const char* op, const char* name, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU like x (move it there)");
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, op, ": ", name,
                  " must have one value for each channel of x, shape (", channels, ",), got shape ",
                  to_string(t.sizes()));
  dtype_of(op, name, t);
}

// Per-channel values in the dtype of arithmetic; `missing` where there is no tensor.
template <class A>
std::vector<A> read_channels(const char* op, const char* name, const OptionalTensor& t,
                             int64_t channels, A missing) {
  std::vector<A> values(channels, missing);
  if (!t) return values;
  check_channels(op, name, *t, channels);
  const int64_t stride = t->stride(0);
  dispatch_floating(op, name, t->scalar_type(), [&](auto element) {
    const auto* p = static_cast<const decltype(element)*>(t->const_data_ptr());
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<A>(p[c * stride]);
  });
  return values;
}

// t[c] = value(c, old t[c]) in double.
template <class Value>
void update_channels(const char* op, const char* name, const Tensor& t, const Value& value) {
  const int64_t stride = t.stride(0), channels = t.size(0);
  dispatch_floating(op, name, t.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T* p = static_cast<T*>(t.mutable_data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      const double v = value(c, static_cast<double>(p[c * stride]));
      if constexpr (std::is_same_v<T, double>) {
        p[c * stride] = v;
      } else {
        p[c * stride] = static_cast<T>(static_cast<float>(v));
      }
    }
  });
}

// How an activation is cut into matrices whose columns each belong to one channel.
//
// channels_last: one matrix, whose rows hold the channels `copies` times so that narrow activations
// fill registers too, and a shorter last row of `tail` elements.
// NCHW: every plane is a matrix of kPlaneWidth columns with such a last row; the columns of all
// channels lie side by side.
//
// Sums are cut into chunks by shape alone, so that results do not depend on the number of threads.
struct Geometry {
  static constexpr int64_t kPlaneWidth = 16;
  // Wide enough that few rows end inside a register and loops are long.
  static constexpr int64_t kGoodWidth = 256;
  static constexpr int64_t kChunkElements = 131072;
  static constexpr int64_t kMaxChunks = 64;

  int64_t batch, channels, plane;
  bool channels_last;
  int64_t width, rows, tail;
  int64_t columns, copies;
  // Rows (channels_last) or images (NCHW) in a chunk.
  int64_t chunk, chunks;

  explicit Geometry(const Tensor& x)
      : batch(x.size(0)), channels(x.size(1)), plane(x.size(2) * x.size(3)) {
    channels_last = channels > 1 && (plane == 1 || !is_nchw_contiguous(x));
    if (channels_last) {
      copies = std::clamp<int64_t>(batch * plane, 1, copies_for(channels));
      width = channels * copies;
      const int64_t elements = batch * plane * channels;
      rows = elements / width;
      tail = elements % width;
      columns = width;
      const int64_t smallest = kChunkElements / std::min(width, kMaxSumColumns);
      chunk = std::max(ceil_div(rows, kMaxChunks), smallest);
      chunk = ceil_div(chunk, 32) * 32;
      chunks = std::max<int64_t>(1, ceil_div(rows, chunk));
    } else {
      width = kPlaneWidth;
      rows = plane / width;
      tail = plane % width;
      columns = channels * width;
      copies = width;
      const int64_t wanted = std::max<int64_t>(1, kMaxChunks / std::max<int64_t>(1, channels));
      chunk = std::max<int64_t>(1, ceil_div(batch, wanted));
      chunks = std::max<int64_t>(1, ceil_div(batch, chunk));
    }
  }

  int64_t values_per_channel() const { return batch * plane; }
  // The columns of a channel.
  int64_t column_of(int64_t channel, int64_t copy) const {
    return channels_last ? copy * channels + channel : channel * kPlaneWidth + copy;
  }

  // Rows end where registers end, if that does not make them too long.
  static int64_t copies_for(int64_t channels) {
    int64_t copies = 1;
    while (channels * copies % 16 != 0 && channels * copies < 2048) ++copies;
    if (channels * copies % 16 != 0) copies = 1;
    return copies * std::max<int64_t>(1, kGoodWidth / (channels * copies));
  }

  // Calls run(first element, matrix, column of the per-channel values that the matrix starts at)
  // in parallel, every element once.
  template <class Run>
  void for_each_matrix(const Run& run) const {
    if (batch * plane * channels == 0) return;
    if (channels_last) {
      const int64_t all_rows = rows + (tail > 0);
      torch::stable::parallel_for(0, all_rows, std::max<int64_t>(1, kGrain / width),
                                  [&](int64_t begin, int64_t end) {
                                    const int64_t full = std::min(end, rows) - begin;
                                    if (full > 0)
                                      run(begin * width, Matrix{full, width, 0, width}, 0);
                                    if (end > rows) run(rows * width, Matrix{1, width, 0, tail}, 0);
                                  });
      return;
    }
    torch::stable::parallel_for(0, batch * channels, std::max<int64_t>(1, kGrain / plane),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t p = begin; p < end; ++p) run_plane(p, run);
                                });
  }

  // The same for sums: calls run(chunk, first element, matrix, column) with a fixed assignment to
  // chunks; calls with the same chunk and column never run at the same time.
  template <class Run>
  void for_each_chunk(const Run& run) const {
    if (batch * plane * channels == 0) return;
    if (channels_last) {
      const int64_t tiles = ceil_div(width, kMaxSumColumns);
      torch::stable::parallel_for(0, chunks * tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t c = task / tiles;
          const int64_t first = task % tiles * kMaxSumColumns;
          const int64_t last = std::min(first + kMaxSumColumns, width);
          const int64_t begin_row = c * chunk, end_row = std::min(begin_row + chunk, rows);
          run(c, begin_row * width, Matrix{end_row - begin_row, width, first, last}, 0);
          if (c == chunks - 1 && first < tail) {
            run(c, rows * width, Matrix{1, width, first, std::min(last, tail)}, 0);
          }
        }
      });
      return;
    }
    const int64_t grain = std::max<int64_t>(1, kGrain / (chunk * plane));
    torch::stable::parallel_for(0, chunks * channels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c = task / channels, channel = task % channels;
        for (int64_t n = c * chunk; n < std::min((c + 1) * chunk, batch); ++n) {
          run_plane(n * channels + channel, [&](int64_t element, const Matrix& m, int64_t column) {
            run(c, element, m, column);
          });
        }
      }
    });
  }

 private:
  template <class Run>
  void run_plane(int64_t p, const Run& run) const {
    const int64_t column = p % channels * kPlaneWidth;
    if (rows > 0) run(p * plane, Matrix{rows, width, 0, width}, column);
    if (tail > 0) run(p * plane + rows * width, Matrix{1, width, 0, tail}, column);
  }
};

// Sums in double, one for each chunk and column, then for each channel; order fixed by the shape.
class ChunkSums {
 public:
  explicit ChunkSums(const Geometry& g) : g_(g), partial_(g.chunks * g.columns) {}

  double* at(int64_t chunk, int64_t column) { return &partial_[chunk * g_.columns + column]; }

  std::vector<double> totals() const {
    std::vector<double> columns(partial_.begin(), partial_.begin() + g_.columns);
    for (int64_t chunk = 1; chunk < g_.chunks; ++chunk) {
      const double* p = &partial_[chunk * g_.columns];
      for (int64_t k = 0; k < g_.columns; ++k) columns[k] += p[k];
    }
    std::vector<double> channels(g_.channels);
    for (int64_t c = 0; c < g_.channels; ++c) {
      for (int64_t copy = 0; copy < g_.copies; ++copy)
        channels[c] += columns[g_.column_of(c, copy)];
    }
    return channels;
  }

 private:
  const Geometry& g_;
  std::vector<double> partial_;
};

// A value for each column from value(channel).
template <class A, class Value>
std::vector<A> expand(const Geometry& g, const Value& value) {
  std::vector<A> columns(g.columns);
  for (int64_t c = 0; c < g.channels; ++c) {
    const A v = value(c);
    for (int64_t copy = 0; copy < g.copies; ++copy) columns[g.column_of(c, copy)] = v;
  }
  return columns;
}

}  // namespace resnet_fused::cpu
