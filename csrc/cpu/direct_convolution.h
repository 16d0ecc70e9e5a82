// Convolutions without an im2col: tiles of output pixels straight from channels_last activations.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace resnet_fused::cpu {

// Images in channels_last, each within `border` pixels of zeros on every side.
struct Activation {
  char* data;
  int64_t height, width, channels, border, element;

  int64_t pixel() const { return channels * element; }
  int64_t row() const { return (width + 2 * border) * pixel(); }
  int64_t image() const { return (height + 2 * border) * row(); }
  char* at(int64_t n, int64_t y, int64_t x) const {
    return data + n * image() + (y + border) * row() + (x + border) * pixel();
  }
  Activation from_image(int64_t n) const {
    Activation images = *this;
    images.data += n * image();
    return images;
  }
};

// A convolution whose weight is packed as (out_channels / kTileChannels, kernel height, kernel
// width, words of a pixel, kTileChannels, elements of a word).
struct DirectConvolution {
  const char* weight;
  const float* shift;  // the bias
  int64_t in_channels, out_channels, element;
  int64_t kernel[2], padding[2], stride[2], dilation[2];
  // Whether the weight is packed for WinogradConvolution, as (out_channels / kTileChannels, 4, 4,
  // in_channels, kTileChannels).
  bool winograd;

  int64_t border() const { return padding[0] > padding[1] ? padding[0] : padding[1]; }
  int64_t panels() const { return out_channels / kTileChannels; }
  int64_t panel_bytes() const {
    const int64_t positions = winograd ? 16 : kernel[0] * kernel[1];
    return positions * in_channels * kTileChannels * element;
  }
  int64_t weight_bytes() const { return panels() * panel_bytes(); }
  // 0 where the kernel does not fit.
  int64_t out_size(int64_t in_size, int axis) const {
    const int64_t room = in_size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
    return room < 0 ? 0 : room / stride[axis] + 1;
  }
};

struct Range {
  int64_t begin, end;
};

// Memory that grows to the largest use.
class Buffer {
 public:
  // Aligned to 64.
  char* of_size(int64_t bytes);
  bool holds(const char* data) const { return size_ > 0 && data == data_; }

 private:
  torch::stable::Tensor memory_;
  int64_t size_ = 0;
  char* data_ = nullptr;
};

// Sets the border to zero.
void clear_border(const Activation& a, int64_t images);

// Copies images without a border into images with one, by all threads.
void copy_into_border(const Activation& x, const Activation& copy, int64_t images);

// Words of a sum that are taken together: their weights stay in a first-level cache while all tiles
// pass by, and sums of sums lose less accuracy than one long sum.
constexpr int64_t kBlockWords = 192;

// A convolution of given activations, cut into parts that can run at the same time.
class ConvolutionParts {
 public:
  virtual ~ConvolutionParts() = default;
  // Parts of the output's pixels; each is computed for any range of the weight's panels.
  virtual int64_t parts() const = 0;
  virtual int64_t scratch_bytes() const = 0;
  // scratch: of scratch_bytes(), aligned to 64.
  virtual void run(Range parts, Range panels, char* scratch) const = 0;
};

// Sums over the taps of each output pixel.
class TiledConvolution final : public ConvolutionParts {
 public:
  // residual may be null and may be out. x must have a border of at least conv.border().
  TiledConvolution(const Kernels& kernels, DType dtype, const DirectConvolution& conv,
                   const Activation& x, const Activation* residual, const Activation& out,
                   int64_t images, bool relu);

  int64_t parts() const override { return lines_ * tiles_per_line_; }
  int64_t scratch_bytes() const override;
  void run(Range tiles, Range panels, char* scratch) const override;

 private:
  // Where a tile lies, without its channels.
  struct Site {
    const char* x;
    Range taps;  // rows of the kernel that fall on the image
    const char* residual;
    char* out;
    int64_t pixels;
  };
  static constexpr int64_t kMaxChunk = 64;

  Site site(int64_t tile) const;
  void copy_pixels(Site& site, char* copy) const;
  int64_t copied_stride() const;
  int64_t chunk() const;

  const Kernels& kernels_;
  DType dtype_;
  const DirectConvolution& conv_;
  Activation x_, residual_, out_;
  float floor_;
  bool flat_;  // every pixel of all images is on one line
  bool copies_;
  int64_t lines_, line_, tiles_per_line_;
};

// 3x3 convolutions of float32 with stride 1 by Winograd's F(2x2, 3x3): 16 products for 4 pixels
// instead of 36. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
class WinogradConvolution final : public ConvolutionParts {
 public:
  // As above; the height and width of out must be even.
  WinogradConvolution(const Kernels& kernels, const DirectConvolution& conv, const Activation& x,
                      const Activation* residual, const Activation& out, int64_t images, bool relu);

  int64_t parts() const override;
  int64_t scratch_bytes() const override;
  void run(Range parts, Range panels, char* scratch) const override;

 private:
  // Parts whose transformed tiles stay in the caches while all weights pass by.
  int64_t group() const;
  int64_t transformed_stride() const;
  // The first tile of a part.
  int64_t first_tile(int64_t part) const;
  void transform_input(int64_t first, int64_t count, char* transformed) const;
  void transform_output(int64_t first, int64_t count, int64_t panel, const char* products) const;

  const Kernels& kernels_;
  const DirectConvolution& conv_;
  Activation x_, residual_, out_;
  float floor_;
  int64_t tiles_per_row_, tiles_per_image_, tiles_;
};

// Runs all parts of a convolution, one thread for each scratch. x_bytes: the size of its input.
void run_shared(const ConvolutionParts& work, const DirectConvolution& conv, int64_t x_bytes,
                std::vector<Buffer>& scratches);

// Weights as WinogradConvolution takes them, in float32, of any strides; those of a transposed
// convolution (its gradient) have in and out exchanged and taps that run backwards.
struct WinogradWeight {
  const float* data;  // the tap to the upper left
  int64_t out_channels, in_channels;
  int64_t out_stride, in_stride, row_stride, column_stride;

  int64_t packed_size() const { return 16 * out_channels * in_channels; }
  // packed: of packed_size(). By all threads.
  void pack(float* packed) const;
};

}  // namespace resnet_fused::cpu
