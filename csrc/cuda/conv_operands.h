// Host side of a convolution: its sizes, and the tensors as the kernels want them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common/checks.h"
#include "cuda/conv_problem.h"

namespace resnet_fused {

// A convolution of x (N, C, H, W) with a weight (K, C / groups, R, S) to (N, K, P, Q).
struct Convolution {
  int64_t n, c, h, w, k, r, s, p, q;
  std::array<int64_t, 2> stride, padding, dilation;
  int64_t groups;

  // geometry: stride, padding, dilation (2 each) and groups.
  Convolution(const char* op, int64_t n, std::array<int64_t, 2> image, const Tensor& weight,
              const std::vector<int64_t>& geometry);

  bool is_pointwise() const {  // a product over pixels, each of which is read once
    return r == 1 && s == 1 && padding == std::array<int64_t, 2>{0, 0};
  }
  int64_t taps() const { return r * s; }
};

// Groups as the kernels see them. Few channels fill neither a vector nor an instruction of the
// tensor cores: then neighbouring groups become one, whose weight is zero between them.
struct Grouping {
  int64_t groups, merged;                   // of them, and of the convolution's in each
  int64_t channels, kernels;                // of one
  int64_t padded_channels, padded_kernels;  // multiples of a chunk
  int64_t pixel_channels;                   // from pixel to pixel of x

  Grouping(const Convolution& conv, int64_t chunk);
};

// Makes one tap of each row of taps, whose channels are those of all its pixels, of an x with zeros
// on both sides of its rows: few channels fill no instruction of the tensor cores.
void join_row_taps(Convolution& conv, Grouping& grouping);

// An activation (N, H, side + W + side, groups, padded): t itself, channels_last, where it has
// vectors and no side is asked for.
Tensor with_padded_groups(const char* op, const Tensor& t, int64_t groups, int64_t channels,
                          int64_t padded, int64_t side = 0);

// (groups, kernels, R, S, padded_channels) in the dtype of x, times scale (K,) where given: the
// weight itself where it lies like that.
Tensor packed_weight(const char* op, const Tensor& weight, const Tensor& x, const Convolution& conv,
                     const Grouping& grouping, const OptionalTensor& scale);

// Of the launchers: x must have the channels that weight asks for, t the shape of the output, and
// scale and shift stand together, with a value for each channel of x.
void check_channels(const char* op, const Convolution& conv, const Tensor& x);
void check_output_shape(const char* op, const char* name, const Convolution& conv, const Tensor& t);
void check_prologue(const char* op, const Convolution& conv, const OptionalTensor& scale,
                    const OptionalTensor& shift, const Tensor& x);

// What kernels count in 32 bits must fit. Tensors may have more elements, an image may not.
void check_sizes(const char* op, const Convolution& conv, const Grouping& grouping);

// Of a size that fits.
constexpr int as_int(int64_t value) { return static_cast<int>(value); }

// (length,) in float32, side by side.
void check_coefficients(const char* op, const char* name, const Tensor& t, int64_t length,
                        const Tensor& x);

// a * gradient + (b * y + d), with coefficients (3, K) = (a, b, d).
Tensor batch_norm_backward(const char* op, const Tensor& gradient, const Tensor& y,
                           const Tensor& coefficients);

// relu(x * scale + shift).
Tensor scale_shift_relu(const char* op, const Tensor& x, const Tensor& scale, const Tensor& shift);

// Whether a prologue's coefficients can be read in vectors of the channels that lie in x.
bool has_vector_coefficients(const Grouping& grouping, const Tensor& scale, const Tensor& shift);

// The forward, as one phase, and the gradient of the input, whose phases are few for usual strides;
// without what depends on tiles.
ConvParameters forward_parameters(const Convolution& conv, const Grouping& grouping,
                                  int64_t step_channels);
std::vector<Phase> forward_phases(const Convolution& conv, const Grouping& grouping,
                                  int64_t step_channels);
ConvParameters gradient_parameters(const Convolution& conv, const Grouping& grouping,
                                   int64_t step_channels);
std::vector<Phase> gradient_phases(const Convolution& conv, const Grouping& grouping,
                                   int64_t step_channels);

}  // namespace resnet_fused
