#include "cpu/convolution.h"

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/direct_convolution.h"
#include "cpu/dispatch_call.h"
#include "cpu/tensors.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;

// From this many elements of weight on, a 1x1 convolution in 16 bits is run as a matrix product: it
// packs the weight for each call otherwise, forward and backward, into a layout it uses once. On
// two cores of a Zen 4, images of 7x7 and batch 8: 400 against 240 GFLOP/s forward, 390 against 200
// backward for 2048 -> 512 channels; below this size there is no difference.
constexpr int64_t kMatrixProductWeights = 1 << 19;

Tensor as_strided(const Tensor& t, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  return call<1>("aten::as_strided", "", t, sizes, strides, std::nullopt)[0];
}

// The pixels of a channels_last image that a 1x1 convolution visits.
struct Pixels {
  int64_t batch, height, width, channels;
  std::vector<int64_t> strides;  // of (batch, height, width, channels)

  Pixels(const Tensor& image, const int64_t* stride)
      : batch(image.size(0)),
        height((image.size(2) - 1) / stride[0] + 1),
        width((image.size(3) - 1) / stride[1] + 1),
        channels(image.size(1)),
        strides{image.stride(0), stride[0] * image.stride(2), stride[1] * image.stride(3), 1} {}

  int64_t rows() const { return batch * height * width; }
  Tensor view(const Tensor& image) const {
    return as_strided(image, {batch, height, width, channels}, strides);
  }
  // (rows, channels); a copy where pixels are left out.
  Tensor matrix(const Tensor& image) const {
    return call<1>("aten::reshape", "", view(image), std::vector<int64_t>{rows(), channels})[0];
  }
  // An image of as many pixels, whose channels are the columns of `matrix`.
  Tensor image(const Tensor& matrix) const {
    const int64_t pixel = matrix.size(1), row = width * pixel;
    return as_strided(matrix, {batch, pixel, height, width}, {height * row, 1, row, pixel});
  }
};

constexpr int64_t kEveryPixel[] = {1, 1};

Tensor transposed(const Tensor& matrix) {
  return as_strided(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

Tensor product(const Tensor& a, const Tensor& b) { return call<1>("aten::mm", "", a, b)[0]; }

bool is_channels_last_dense(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(3) == t.size(1) && t.stride(2) == t.size(3) * t.stride(3) &&
         t.stride(0) == t.size(2) * t.stride(2);
}

// The strides of dimensions of size 1 are free, but PyTorch tells the layout of a convolution's
// output by them.
Tensor with_usual_strides(const Tensor& t) {
  if (is_channels_last_dense(t)) return t;
  const int64_t pixel = t.size(1), row = t.size(3) * pixel;
  return as_strided(t, {t.size(0), pixel, t.size(2), t.size(3)}, {t.size(2) * row, 1, row, pixel});
}

bool as_matrix_product(const Tensor& x, const Tensor& weight, const int64_t* geometry) {
  const bool is_pointwise = weight.size(2) == 1 && weight.size(3) == 1 && geometry[0] == 0 &&
                            geometry[1] == 0 && geometry[6] == 1;
  return is_pointwise && x.scalar_type() == ScalarType::BFloat16 &&
         weight.numel() >= kMatrixProductWeights && is_channels_last_dense(x) && x.numel() > 0;
}

// (K, C, 1, 1) in any of its equivalent layouts as the matrix (K, C).
Tensor weight_matrix(const Tensor& weight) {
  return as_strided(weight, {weight.size(0), weight.size(1)}, {weight.stride(0), weight.stride(1)});
}

// Below so many tiles of 2x2 pixels, transforming the weight takes longer than it saves.
constexpr int64_t kWinogradTiles = 28;

// Whether a 3x3 convolution that keeps the size of its images, or its gradient, is run by
// Winograd's algorithm.
bool by_winograd(const Tensor& x, const Tensor& weight, const int64_t* geometry) {
  constexpr int64_t kPlain[kGeometry] = {1, 1, 1, 1, 1, 1, 1};
  return x.scalar_type() == ScalarType::Float && weight.size(2) == 3 && weight.size(3) == 3 &&
         std::equal(kPlain, kPlain + kGeometry, geometry) && weight.size(0) % kTileChannels == 0 &&
         weight.size(1) % kTileChannels == 0 && x.size(2) % 2 == 0 && x.size(3) % 2 == 0 &&
         x.size(0) * x.size(2) * x.size(3) / 4 >= kWinogradTiles && is_channels_last_dense(x) &&
         kernels().winograd_input != nullptr;
}

// The convolution of x or, transposed, what it gives back to its input for the gradient x.
Tensor winograd(const Tensor& x, const Tensor& weight, bool transposed) {
  const float* taps = static_cast<const float*>(weight.const_data_ptr());
  WinogradWeight view{taps,
                      weight.size(0),
                      weight.size(1),
                      weight.stride(0),
                      weight.stride(1),
                      weight.stride(2),
                      weight.stride(3)};
  if (transposed) {
    view = {taps + 2 * weight.stride(2) + 2 * weight.stride(3),
            weight.size(1),
            weight.size(0),
            weight.stride(1),
            weight.stride(0),
            -weight.stride(2),
            -weight.stride(3)};
  }
  const int64_t images = x.size(0), height = x.size(2), width = x.size(3);
  Buffer packed, bordered;
  float* const packed_weight =
      reinterpret_cast<float*>(packed.of_size(view.packed_size() * sizeof(float)));
  view.pack(packed_weight);
  const std::vector<float> no_shift(view.out_channels, 0.0f);
  const DirectConvolution conv{reinterpret_cast<const char*>(packed_weight),
                               no_shift.data(),
                               view.in_channels,
                               view.out_channels,
                               sizeof(float),
                               {3, 3},
                               {1, 1},
                               {1, 1},
                               {1, 1},
                               true};
  const Activation in{static_cast<char*>(const_cast<void*>(x.const_data_ptr())),
                      height,
                      width,
                      view.in_channels,
                      0,
                      sizeof(float)};
  Activation copy = in;
  copy.border = 1;
  copy.data = bordered.of_size(images * copy.image());
  copy_into_border(in, copy, images);
  const int64_t pixel = view.out_channels;
  const int64_t sizes[] = {images, pixel, height, width};
  const int64_t strides[] = {height * width * pixel, 1, width * pixel, pixel};
  const Tensor y = empty_strided(sizes, strides, dtype_code(x));
  const Activation out{
      static_cast<char*>(y.mutable_data_ptr()), height, width, pixel, 0, sizeof(float)};
  std::vector<Buffer> scratches(torch::stable::get_num_threads());
  run_shared(WinogradConvolution(kernels(), conv, copy, nullptr, out, images, false), conv,
             images * copy.image(), scratches);
  return y;
}

// From this many elements of weight on, images are small, and the gradient of the weight is a
// product with the unfolded input (im2col): on two cores of a Zen 4, batch 8, 512 channels, 3x3 on
// 7x7 images, 8.5 -> 5.6 ms in bfloat16, and 14.0 -> 5.6 ms with stride 2. At a quarter of it
// oneDNN is as fast.
constexpr int64_t kUnfoldedWeights = 1 << 21;

bool by_unfolding(const Tensor& x, const Tensor& weight, const int64_t* geometry) {
  return weight.numel() >= kUnfoldedWeights && geometry[6] == 1 && geometry[0] == geometry[1] &&
         (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16) &&
         weight.size(2) * weight.size(3) > 1 && is_channels_last_dense(x) && x.numel() > 0;
}

Tensor weight_gradient(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                       const int64_t* geometry) {
  const int64_t batch = x.size(0), channels = x.size(1);
  const int64_t element = x.scalar_type() == ScalarType::Float ? 4 : 2;
  const Activation in{static_cast<char*>(const_cast<void*>(x.const_data_ptr())),
                      x.size(2),
                      x.size(3),
                      channels,
                      0,
                      element};
  Activation bordered = in;
  bordered.border = geometry[0];
  const Tensor memory = empty_vector(batch * bordered.image() / element, dtype_code(x));
  bordered.data = static_cast<char*>(memory.mutable_data_ptr());
  copy_into_border(in, bordered, batch);
  const int64_t image = bordered.image() / element, row = bordered.row() / element;
  const Tensor taps = as_strided(
      memory, {batch, grad_y.size(2), grad_y.size(3), weight.size(2), weight.size(3), channels},
      {image, geometry[2] * row, geometry[3] * channels, geometry[4] * row, geometry[5] * channels,
       1});
  const Tensor grad_rows = Pixels(grad_y, kEveryPixel).matrix(grad_y);
  const int64_t tap_row = weight.size(3) * channels, filter = weight.size(2) * tap_row;
  const Tensor unfolded =
      call<1>("aten::reshape", "", taps, std::vector<int64_t>{grad_rows.size(0), filter})[0];
  const Tensor matrix = product(transposed(grad_rows), unfolded);
  return as_strided(matrix, {weight.size(0), channels, weight.size(2), weight.size(3)},
                    {filter, 1, tap_row, channels});
}

std::vector<int64_t> pair(const int64_t* geometry, int64_t i) {
  return {geometry[2 * i], geometry[2 * i + 1]};
}

}  // namespace

Tensor convolve(const Tensor& x, const Tensor& weight, const int64_t* geometry) {
  if (as_matrix_product(x, weight, geometry)) {
    const Pixels pixels(x, geometry + 2);
    return pixels.image(product(pixels.matrix(x), transposed(weight_matrix(weight))));
  }
  if (by_winograd(x, weight, geometry)) return winograd(x, weight, false);
  return call<1>("aten::convolution", "", with_usual_strides(x), weight, std::nullopt,
                 pair(geometry, 1), pair(geometry, 0), pair(geometry, 2), false,
                 std::vector<int64_t>{0, 0}, geometry[6])[0];
}

std::pair<Tensor, Tensor> convolve_backward(const Tensor& grad_y, const Tensor& x,
                                            const Tensor& weight, const int64_t* geometry,
                                            bool want_grad_x, bool want_grad_weight) {
  if (as_matrix_product(x, weight, geometry) && is_channels_last_dense(grad_y)) {
    const Pixels pixels(x, geometry + 2);
    const Tensor grad_rows = Pixels(grad_y, kEveryPixel).matrix(grad_y);
    Tensor grad_x, grad_weight;
    if (want_grad_x) {
      const Tensor rows = product(grad_rows, weight_matrix(weight));
      if (pixels.rows() * pixels.channels == x.numel()) {
        grad_x = pixels.image(rows);
      } else {
        grad_x = torch::stable::empty_like(x);
        torch::stable::zero_(grad_x);
        const std::vector<int64_t> sizes{pixels.batch, pixels.height, pixels.width,
                                         pixels.channels};
        call<1>("aten::copy_", "", pixels.view(grad_x),
                call<1>("aten::reshape", "", rows, sizes)[0], false);
      }
    }
    if (want_grad_weight) {
      const Tensor matrix = product(transposed(grad_rows), pixels.matrix(x));
      grad_weight = as_strided(matrix, {matrix.size(0), matrix.size(1), 1, 1},
                               {matrix.stride(0), matrix.stride(1), 1, 1});
    }
    return {grad_x, grad_weight};
  }
  Tensor grad_x, grad_weight;
  if (is_channels_last_dense(grad_y)) {
    if (want_grad_x && by_winograd(x, weight, geometry)) grad_x = winograd(grad_y, weight, true);
    if (want_grad_weight && by_unfolding(x, weight, geometry)) {
      grad_weight = weight_gradient(grad_y, x, weight, geometry);
    }
  }
  const std::array<bool, 3> mask{want_grad_x && !grad_x.defined(),
                                 want_grad_weight && !grad_weight.defined(), false};
  if (mask[0] || mask[1]) {
    auto grads =
        call<3>("aten::convolution_backward", "", with_usual_strides(grad_y), with_usual_strides(x),
                weight, std::nullopt, pair(geometry, 1), pair(geometry, 0), pair(geometry, 2),
                false, std::vector<int64_t>{0, 0}, geometry[6],
                torch::headeronly::HeaderOnlyArrayRef<bool>(mask.data(), mask.size()));
    if (mask[0]) grad_x = grads[0];
    if (mask[1]) grad_weight = grads[1];
  }
  return {grad_x, grad_weight};
}

}  // namespace resnet_fused::cpu
