// The table of inner loops that every instruction set provides, and their arguments.
//
// Every loop runs over a matrix: `rows` rows, `width` elements apart, and in each row the columns
// [begin, end). Per-channel values (A*) are indexed by column, so a column always belongs to one
// channel. A is the arithmetic type: float, or double for float64 tensors.
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

struct Matrix {
  int64_t rows, width, begin, end;
};

// The most columns that kernels with sums (statistics, reduce) take at once.
constexpr int64_t kMaxSumColumns = 2048;

enum DType { kFloat32, kBFloat16, kFloat16, kFloat64, kDTypes };
enum Residual { kNoResidual, kPlainResidual, kBatchNormResidual, kResiduals };
// Where backward takes the sign of the ReLU's input from.
enum Mask { kNoMask, kMaskFromOut, kMaskFromX, kMasks };

// (x - mean) * scale + bias, always in this order of operations.
struct Affine {
  const void *mean, *scale, *bias;
};

struct StatisticsArgs {
  const void* x;
  const void* shift;
  // Sums of x - shift and of its square.
  double *sum, *sum_squares;
};

struct ApplyArgs {
  const void *x, *residual;
  void* out;
  Affine bn, residual_bn;
};

struct ReduceArgs {
  const void *grad_out, *out, *x, *residual;
  // Receives the masked grad_out with kPlainResidual.
  void* grad_residual;
  Affine bn, residual_bn;
  // Sums of dy, dy * (x - mean) and, with kBatchNormResidual, dy * (residual - residual mean),
  // where dy is the masked grad_out.
  double *sum_dy, *sum_dy_x, *sum_dy_residual;
};

// grad_x = scale * (dy - mean_dy - (x - mean) * slope)
struct Projection {
  const void *mean_dy, *slope;
};

struct GradientArgs {
  const void *grad_out, *out, *x, *residual;
  // grad_residual receives the masked grad_out with kPlainResidual.
  void *grad_x, *grad_residual;
  Affine bn, residual_bn;
  Projection projection, residual_projection;
};

// In place of a maximum's position in its window: it is not positive, so that no gradient passes.
constexpr int64_t kClosed = 255;

// Pooling along one side of an image.
struct PoolingAxis {
  int64_t size, out_size, kernel, stride, padding;
};

// Pooling of `channels` channels of an image, whose pixels are `pixel` elements apart.
struct Pooling {
  PoolingAxis rows, columns;
  int64_t pixel, channels;
};

struct MaxPoolArgs {
  const void* x;
  Affine bn;
  void* out;
  uint8_t* argmax;
};

struct MaxPoolSumsArgs {
  const void *grad_out, *x;
  const uint8_t* argmax;
  const void* mean;
  // Sums of dy and dy * (x - mean), where dy is grad_out at the place of the maximum.
  double *sum_dy, *sum_dy_x;
};

struct MaxPoolGradientArgs {
  const void *grad_out, *x;
  const uint8_t* argmax;
  void* grad_x;
  Affine bn;
  Projection projection;
};

// Pixels and channels of the output that a direct convolution computes at once.
constexpr int64_t kTilePixels = 14;
constexpr int64_t kTileChannels = 32;

constexpr int64_t kTileSums = kTilePixels * kTileChannels;

// A part of the sum over taps and channels for one tile: up to kTilePixels output pixels at equal
// distances, kTileChannels output channels. Distances are in bytes; a word is one float or two
// bfloat16.
struct ConvolutionTile {
  const char* x;  // the first word of the first pixel
  int64_t x_stride;
  // `words` in each of several rows of the kernel.
  int64_t rows, row_stride, words;
  const char* weight;  // kTileChannels words for each of them
  const float* shift;  // where the sum begins, if this part is the first
  float* sums;         // kTileSums: where it goes on, and is left unless this part is the last
  bool first, last;
  // Used by the last part.
  const char* residual;  // may be null
  int64_t residual_stride;
  char* out;
  int64_t out_stride;
  float floor;  // 0 for ReLU, else minus infinity
};

// One row of a 3x3 maximum with stride 2, distances in bytes.
struct MaxPoolRow {
  const char* x;  // the tap to the upper left of the first pixel
  int64_t row_stride, pixels, channels;
  char* out;
};

// Winograd's F(2x2, 3x3): 4x4 pixels of x give 2x2 of out. Distances are in bytes; `position` is
// the distance between the 16 elements of a transformed tile.
struct WinogradInput {
  const char* x;  // upper left of the 4x4 pixels
  int64_t row_stride, pixel_stride, channels;
  char* transformed;
  int64_t position;
};

// kTileChannels channels of one tile.
struct WinogradOutput {
  const char* transformed;
  int64_t position;
  const float* shift;
  const char* residual;  // may be null
  int64_t residual_row_stride, residual_pixel_stride;
  char* out;
  int64_t out_row_stride, out_pixel_stride;
  float floor;
};

// Arguments go by value: the compiler then knows that no store through a pointer changes them.
struct Kernels {
  const char* name;
  void (*add_relu[kDTypes])(const void* x, const void* residual, void* out, int64_t n);
  void (*add_relu_backward[kDTypes])(const void* grad_out, const void* out, void* grad, int64_t n);
  void (*statistics[kDTypes])(Matrix, StatisticsArgs);
  void (*apply[kDTypes][kResiduals][2])(Matrix, ApplyArgs);  // [relu]
  void (*reduce[kDTypes][kMasks][kResiduals])(Matrix, ReduceArgs);
  // [training] [residual_training]; without training there is no projection.
  void (*gradients[kDTypes][kMasks][kResiduals][2][2])(Matrix, GradientArgs);
  // Of rows [begin, end), of the pooled image but for the gradients. Sums take at most
  // kMaxSumColumns channels.
  void (*max_pool[kDTypes])(Pooling, MaxPoolArgs, int64_t begin, int64_t end);
  void (*max_pool_sums[kDTypes])(Pooling, MaxPoolSumsArgs, int64_t begin, int64_t end);
  void (*max_pool_gradients[kDTypes][2])(Pooling, MaxPoolGradientArgs, int64_t begin,
                                         int64_t end);  // [training]
  // [pixels]; null for dtypes without an inner loop.
  void (*convolution_tile[kDTypes][kTilePixels + 1])(ConvolutionTile);
  void (*max_pool_row[kDTypes])(MaxPoolRow);
  void (*winograd_input)(WinogradInput);
  void (*winograd_output)(WinogradOutput);
};

// Null where the compiler or the target lacks the instruction set.
const Kernels* default_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace resnet_fused::cpu
