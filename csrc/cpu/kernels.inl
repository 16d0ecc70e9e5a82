// The inner loops, compiled once per instruction set into namespace RESNET_FUSED_ISA. All of them
// round alike on every instruction set (but for subnormal bfloat16 results, see vec.inl): there is
// no fused multiply-add, and the order of a sum does not depend on the vector length.
#include "cpu/kernels.h"

namespace resnet_fused::cpu::RESNET_FUSED_ISA {
namespace {

#include "cpu/vec.inl"

template <class T>
using Vec = typename Element<T>::Vec;
template <class T>
using Scalar = typename Element<T>::Scalar;

// Rows summed in Scalar before their sums go on in double.
constexpr int64_t kSumRows = 32;
// Rows whose mean is the first guess of a mean.
constexpr int64_t kGuessRows = 8;

// A number of rows known at compile time.
struct OneRow {
  constexpr operator int64_t() const { return 1; }
};

template <class T, class Body>
RESNET_FUSED_INLINE void for_each_column(const Matrix& m, const Body& body) {
  int64_t column = m.begin;
  for (; column + kLanes<T> <= m.end; column += kLanes<T>) body(column, AllLanes{});
  if (column < m.end) body(column, m.end - column);
}

// Calls body(row, rows, column, lanes) until every element was visited. A narrow matrix is walked
// down its columns with everything per-channel in registers. A wide one is walked along its rows:
// several rows at once would keep more in registers, but memory that is not read in order arrives
// at half the speed.
template <class T, class Body>
RESNET_FUSED_INLINE void for_each_block(const Matrix& m, const Body& body) {
  if (m.end - m.begin <= 2 * kLanes<T>) {
    for_each_column<T>(
        m, [&](int64_t column, auto n) RESNET_FUSED_INLINE_BODY { body(0, m.rows, column, n); });
    return;
  }
  for (int64_t row = 0; row < m.rows; ++row) {
    for_each_column<T>(m, [&](int64_t column, auto n)
                              RESNET_FUSED_INLINE_BODY { body(row, OneRow{}, column, n); });
  }
}

// Per-column sums of a few rows, close to the registers.
template <class T>
struct Sums {
  alignas(64) Scalar<T> values[kMaxSumColumns];

  __attribute__((always_inline)) void clear(int64_t columns) {
    __builtin_memset(values, 0, columns * sizeof(Scalar<T>));
  }
  __attribute__((always_inline)) Vec<T> at(int64_t column) const { return load(values + column); }
  // Lanes beyond the last column are written as well; they are never read.
  __attribute__((always_inline)) void set(int64_t column, Vec<T> v) { store(values + column, v); }
  __attribute__((always_inline)) void add(int64_t column, Vec<T> v) {
    store(values + column, load(values + column) + v);
  }
};

// Calls body(offset, matrix) for matrices of at most kSumRows rows, which follow each other.
template <class Body>
RESNET_FUSED_INLINE void for_each_group(const Matrix& m, const Body& body) {
  for (int64_t row = 0; row < m.rows; row += kSumRows) {
    const int64_t rows = m.rows - row < kSumRows ? m.rows - row : kSumRows;
    body(row * m.width, Matrix{rows, m.width, m.begin, m.end});
  }
}

template <class T>
RESNET_FUSED_INLINE void add_columns(const Matrix& m, double* totals, const Sums<T>& sums) {
  for_each_column<T>(m, [&](int64_t column, auto n) RESNET_FUSED_INLINE_BODY {
    add(totals + column, sums.at(column - m.begin), n);
  });
}

template <class T, class N>
RESNET_FUSED_INLINE Vec<T> load_channels(const void* values, int64_t column, N n) {
  return load(static_cast<const Scalar<T>*>(values) + column, n);
}

template <class T>
struct LoadedAffine {
  Vec<T> mean, scale, bias;

  __attribute__((always_inline)) Vec<T> operator()(Vec<T> x) const {
    return (x - mean) * scale + bias;
  }
};

template <class T, class N>
RESNET_FUSED_INLINE LoadedAffine<T> load_affine(const Affine& a, int64_t column, N n) {
  return {load_channels<T>(a.mean, column, n), load_channels<T>(a.scale, column, n),
          load_channels<T>(a.bias, column, n)};
}

template <class T>
void add_relu_kernel(const void* x, const void* residual, void* out, int64_t n) {
  const T* px = static_cast<const T*>(x);
  const T* pr = static_cast<const T*>(residual);
  T* po = static_cast<T*>(out);
  for_each_column<T>({1, n, 0, n}, [=](int64_t i, auto lanes) {
    store(po + i, relu(load(px + i, lanes) + load(pr + i, lanes)), lanes);
  });
}

template <class T>
void add_relu_backward_kernel(const void* grad_out, const void* out, void* grad, int64_t n) {
  const T* pg = static_cast<const T*>(grad_out);
  const T* po = static_cast<const T*>(out);
  T* pgrad = static_cast<T*>(grad);
  for_each_column<T>({1, n, 0, n}, [=](int64_t i, auto lanes) {
    const Vec<T> g = load(pg + i, lanes);
    store(pgrad + i, load(po + i, lanes) <= 0 ? Vec<T>{} : g, lanes);
  });
}

// Differences from a guess of the mean are summed, which loses nothing however large the mean is:
// the mean of a few rows, then of each group for the next. Moving the sums to the common `shift` is
// exact enough in double. A guess is short, so that float16 differences are exact. Squares of
// bfloat16 are short enough to be summed as they are: whatever 32 of them lose is small against
// their variance.
template <class T>
void statistics_kernel(Matrix m, StatisticsArgs args) {
  constexpr bool kDifferences = !is_bfloat16<T>;
  const T* x = static_cast<const T*>(args.x);
  Sums<T> sums, squares, guesses;
  guesses.clear(m.end - m.begin);
  if constexpr (kDifferences) {
    const int64_t rows = m.rows < kGuessRows ? m.rows : kGuessRows;
    for_each_column<T>(m, [&](int64_t column, auto n) RESNET_FUSED_INLINE_BODY {
      Vec<T> sum{};
      for (int64_t r = 0; r < rows; ++r) sum += load(x + r * m.width + column, n);
      guesses.set(column - m.begin, shorten(sum / static_cast<Scalar<T>>(rows)));
    });
  }
  for_each_group(m, [&](int64_t offset, const Matrix& group) {
    sums.clear(m.end - m.begin);
    squares.clear(m.end - m.begin);
    const auto body = [&](int64_t row, auto rows, int64_t column, auto n) RESNET_FUSED_INLINE_BODY {
      const Vec<T> guess = guesses.at(column - m.begin);
      Vec<T> sum{}, square{};
      for (int64_t r = row; r < row + rows; ++r) {
        Vec<T> d = load(x + offset + r * m.width + column, n);
        if constexpr (kDifferences) d -= guess;
        sum += d;
        square += d * d;
      }
      sums.add(column - m.begin, sum);
      squares.add(column - m.begin, square);
    };
    for_each_block<T>(group, body);
    const Scalar<T> rows = static_cast<Scalar<T>>(group.rows);
    for_each_column<T>(m, [&](int64_t column, auto n) RESNET_FUSED_INLINE_BODY {
      const Vec<T> shift = load_channels<T>(args.shift, column, n);
      const Vec<T> guess = guesses.at(column - m.begin);
      const Vec<T> sum = sums.at(column - m.begin);
      const Vec<T> square = squares.at(column - m.begin);
      for (int part = 0; part < kParts<Vec<T>>; ++part) {
        const DoubleVec move = to_double(guess, part) - to_double(shift, part);
        const DoubleVec part_sum = to_double(sum, part);
        add_part(args.sum + column, part_sum + rows * move, part, n);
        add_part(args.sum_squares + column,
                 to_double(square, part) + move * (2 * part_sum + rows * move), part, n);
      }
      if constexpr (kDifferences) guesses.set(column - m.begin, shorten(guess + sum / rows));
    });
  });
}

template <class T, Residual kResidual, bool kRelu>
void apply_kernel(Matrix m, ApplyArgs args) {
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* out = static_cast<T*>(args.out);
  const auto body = [&](int64_t row, auto rows, int64_t column, auto n) RESNET_FUSED_INLINE_BODY {
    const auto bn = load_affine<T>(args.bn, column, n);
    LoadedAffine<T> residual_bn{};
    if constexpr (kResidual == kBatchNormResidual) {
      residual_bn = load_affine<T>(args.residual_bn, column, n);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = (row + r) * m.width + column;
      Vec<T> v = bn(load(x + i, n));
      if constexpr (kResidual == kPlainResidual) v += load(residual + i, n);
      if constexpr (kResidual == kBatchNormResidual) v += residual_bn(load(residual + i, n));
      store(out + i, kRelu ? relu(v) : v, n);
    }
  };
  for_each_block<T>(m, body);
}

// The gradient behind the ReLU: grad_out where the ReLU's input was not <= 0.
template <class T, Mask kMask, class N>
RESNET_FUSED_INLINE Vec<T> masked(const T* grad_out, const T* out, int64_t i, Vec<T> x,
                                  const LoadedAffine<T>& bn, N n) {
  const Vec<T> g = load(grad_out + i, n);
  if constexpr (kMask == kMaskFromOut) return load(out + i, n) <= 0 ? Vec<T>{} : g;
  if constexpr (kMask == kMaskFromX) return bn(x) <= Element<T>::kRoundsToZero ? Vec<T>{} : g;
  return g;
}

template <class T, Mask kMask, Residual kResidual>
void reduce_kernel(Matrix m, ReduceArgs args) {
  const T* grad_out = static_cast<const T*>(args.grad_out);
  const T* out = static_cast<const T*>(args.out);
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* grad_residual = static_cast<T*>(args.grad_residual);
  Sums<T> sum_dy, sum_dy_x, sum_dy_residual;
  for_each_group(m, [&](int64_t offset, const Matrix& group) {
    sum_dy.clear(m.end - m.begin);
    sum_dy_x.clear(m.end - m.begin);
    if constexpr (kResidual == kBatchNormResidual) sum_dy_residual.clear(m.end - m.begin);
    const auto body = [&](int64_t row, auto rows, int64_t column, auto n) RESNET_FUSED_INLINE_BODY {
      LoadedAffine<T> bn{};
      bn.mean = load_channels<T>(args.bn.mean, column, n);
      if constexpr (kMask == kMaskFromX) bn = load_affine<T>(args.bn, column, n);
      Vec<T> residual_mean{};
      if constexpr (kResidual == kBatchNormResidual) {
        residual_mean = load_channels<T>(args.residual_bn.mean, column, n);
      }
      Vec<T> dy_sum{}, dy_x_sum{}, dy_residual_sum{};
      for (int64_t r = row; r < row + rows; ++r) {
        const int64_t i = offset + r * m.width + column;
        const Vec<T> x_i = load(x + i, n);
        const Vec<T> dy = masked<T, kMask>(grad_out, out, i, x_i, bn, n);
        dy_sum += dy;
        dy_x_sum += dy * (x_i - bn.mean);
        if constexpr (kResidual == kPlainResidual) store(grad_residual + i, dy, n);
        if constexpr (kResidual == kBatchNormResidual) {
          dy_residual_sum += dy * (load(residual + i, n) - residual_mean);
        }
      }
      sum_dy.add(column - m.begin, dy_sum);
      sum_dy_x.add(column - m.begin, dy_x_sum);
      if constexpr (kResidual == kBatchNormResidual) {
        sum_dy_residual.add(column - m.begin, dy_residual_sum);
      }
    };
    for_each_block<T>(group, body);
    add_columns<T>(m, args.sum_dy, sum_dy);
    add_columns<T>(m, args.sum_dy_x, sum_dy_x);
    if constexpr (kResidual == kBatchNormResidual) {
      add_columns<T>(m, args.sum_dy_residual, sum_dy_residual);
    }
  });
}

// Backward of batch norm for one element.
template <class T, bool kTraining>
struct LoadedProjection {
  Vec<T> mean, scale, mean_dy, slope;

  __attribute__((always_inline)) Vec<T> operator()(Vec<T> dy, Vec<T> x) const {
    return kTraining ? scale * (dy - mean_dy - (x - mean) * slope) : scale * dy;
  }
};

template <class T, bool kTraining, class N>
RESNET_FUSED_INLINE LoadedProjection<T, kTraining> load_projection(const Affine& a,
                                                                   const Projection& p,
                                                                   int64_t column, N n) {
  LoadedProjection<T, kTraining> loaded{};
  loaded.scale = load_channels<T>(a.scale, column, n);
  if constexpr (kTraining) {
    loaded.mean = load_channels<T>(a.mean, column, n);
    loaded.mean_dy = load_channels<T>(p.mean_dy, column, n);
    loaded.slope = load_channels<T>(p.slope, column, n);
  }
  return loaded;
}

template <class T, Mask kMask, Residual kResidual, bool kTraining, bool kResidualTraining>
void gradients_kernel(Matrix m, GradientArgs args) {
  constexpr bool kResidualBn = kResidual == kBatchNormResidual;
  const T* grad_out = static_cast<const T*>(args.grad_out);
  const T* out = static_cast<const T*>(args.out);
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* grad_x = static_cast<T*>(args.grad_x);
  T* grad_residual = static_cast<T*>(args.grad_residual);
  const auto body = [&](int64_t row, auto rows, int64_t column, auto n) RESNET_FUSED_INLINE_BODY {
    LoadedAffine<T> bn{};
    if constexpr (kMask == kMaskFromX) bn = load_affine<T>(args.bn, column, n);
    const auto projection = load_projection<T, kTraining>(args.bn, args.projection, column, n);
    LoadedProjection<T, kResidualTraining> residual_projection{};
    if constexpr (kResidualBn) {
      residual_projection = load_projection<T, kResidualTraining>(
          args.residual_bn, args.residual_projection, column, n);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = (row + r) * m.width + column;
      Vec<T> x_i{}, residual_i{};
      if constexpr (kTraining || kMask == kMaskFromX) x_i = load(x + i, n);
      if constexpr (kResidualBn && kResidualTraining) residual_i = load(residual + i, n);
      const Vec<T> dy = masked<T, kMask>(grad_out, out, i, x_i, bn, n);
      store(grad_x + i, projection(dy, x_i), n);
      if constexpr (kResidual == kPlainResidual) store(grad_residual + i, dy, n);
      if constexpr (kResidualBn) store(grad_residual + i, residual_projection(dy, residual_i), n);
    }
  };
  for_each_block<T>(m, body);
}

#include "cpu/max_pool.inl"

template <class T>
void max_pool_row_kernel(MaxPoolRow row) {
  const int64_t pixel = row.channels * sizeof(T);
  T* out = reinterpret_cast<T*>(row.out);
  for (int64_t i = 0; i < row.pixels; ++i, out += row.channels) {
    const char* x = row.x + 2 * i * pixel;
    for_each_column<T>(
        {1, row.channels, 0, row.channels}, [&](int64_t c, auto n) RESNET_FUSED_INLINE_BODY {
          const auto tap = [&](int64_t y, int64_t x_tap) RESNET_FUSED_INLINE_BODY {
            return load(reinterpret_cast<const T*>(x + y * row.row_stride + x_tap * pixel) + c, n);
          };
          Vec<T> highest = tap(0, 0);
          for (int64_t i_tap = 1; i_tap < 9; ++i_tap) {
            const Vec<T> v = tap(i_tap / 3, i_tap % 3);
            // NaN stays.
            highest = (highest >= v) | (highest != highest) ? highest : v;
          }
          store(out + c, highest, n);
        });
  }
}

#if defined(RESNET_FUSED_AVX512)
#include "cpu/convolution_tile.inl"
#endif

template <class T, Residual kResidual>
constexpr void add_for_residual(Kernels& k, DType dtype) {
  k.apply[dtype][kResidual][false] = apply_kernel<T, kResidual, false>;
  k.apply[dtype][kResidual][true] = apply_kernel<T, kResidual, true>;
  k.reduce[dtype][kNoMask][kResidual] = reduce_kernel<T, kNoMask, kResidual>;
  k.reduce[dtype][kMaskFromOut][kResidual] = reduce_kernel<T, kMaskFromOut, kResidual>;
  k.reduce[dtype][kMaskFromX][kResidual] = reduce_kernel<T, kMaskFromX, kResidual>;
}

template <class T, Mask kMask>
constexpr void add_for_mask(Kernels& k, DType dtype) {
  auto& none = k.gradients[dtype][kMask][kNoResidual];
  none[false][false] = gradients_kernel<T, kMask, kNoResidual, false, false>;
  none[true][false] = gradients_kernel<T, kMask, kNoResidual, true, false>;
  auto& plain = k.gradients[dtype][kMask][kPlainResidual];
  plain[false][false] = gradients_kernel<T, kMask, kPlainResidual, false, false>;
  plain[true][false] = gradients_kernel<T, kMask, kPlainResidual, true, false>;
  auto& dual = k.gradients[dtype][kMask][kBatchNormResidual];
  dual[false][false] = gradients_kernel<T, kMask, kBatchNormResidual, false, false>;
  dual[false][true] = gradients_kernel<T, kMask, kBatchNormResidual, false, true>;
  dual[true][false] = gradients_kernel<T, kMask, kBatchNormResidual, true, false>;
  dual[true][true] = gradients_kernel<T, kMask, kBatchNormResidual, true, true>;
}

template <class T>
constexpr void add_kernels(Kernels& k, DType dtype) {
  k.add_relu[dtype] = add_relu_kernel<T>;
  k.add_relu_backward[dtype] = add_relu_backward_kernel<T>;
  k.statistics[dtype] = statistics_kernel<T>;
  add_for_residual<T, kNoResidual>(k, dtype);
  add_for_residual<T, kPlainResidual>(k, dtype);
  add_for_residual<T, kBatchNormResidual>(k, dtype);
  add_for_mask<T, kNoMask>(k, dtype);
  add_for_mask<T, kMaskFromOut>(k, dtype);
  add_for_mask<T, kMaskFromX>(k, dtype);
  k.max_pool[dtype] = max_pool_kernel<T>;
  k.max_pool_sums[dtype] = max_pool_sums_kernel<T>;
  k.max_pool_gradients[dtype][false] = max_pool_gradients_kernel<T, false>;
  k.max_pool_gradients[dtype][true] = max_pool_gradients_kernel<T, true>;
  k.max_pool_row[dtype] = max_pool_row_kernel<T>;
}

constexpr Kernels make_kernels(const char* name) {
  Kernels k{};
  k.name = name;
  add_kernels<float>(k, kFloat32);
  add_kernels<BFloat16>(k, kBFloat16);
  add_kernels<Float16>(k, kFloat16);
  add_kernels<double>(k, kFloat64);
#if defined(RESNET_FUSED_AVX512)
  add_convolution_tiles<float, kTilePixels>(k, kFloat32);
  k.winograd_input = winograd_input;
  k.winograd_output = winograd_output;
#endif
#if defined(RESNET_FUSED_AVX512BF16)
  add_convolution_tiles<BFloat16, kTilePixels>(k, kBFloat16);
#endif
  return k;
}

}  // namespace
}  // namespace resnet_fused::cpu::RESNET_FUSED_ISA
