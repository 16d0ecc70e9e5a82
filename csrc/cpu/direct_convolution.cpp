#include "cpu/direct_convolution.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kWord = 4;
constexpr int64_t kCacheLine = 64;
// Pixels this far apart start to share the sets of a first-level cache of 64 sets.
constexpr int64_t kFarPixels = 1024;
// Input that is used with all weights before the next: what a second-level cache holds beside them.
constexpr int64_t kChunkBytes = 131072;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

TiledConvolution::TiledConvolution(const Kernels& kernels, DType dtype,
                                   const DirectConvolution& conv, const Activation& x,
                                   const Activation* residual, const Activation& out,
                                   int64_t images, bool relu)
    : kernels_(kernels),
      dtype_(dtype),
      conv_(conv),
      x_(x),
      residual_(residual ? *residual : Activation{}),
      out_(out),
      floor_(relu ? 0.0f : -std::numeric_limits<float>::infinity()) {
  const bool pointwise =
      conv.kernel[0] == 1 && conv.kernel[1] == 1 && conv.padding[0] == 0 && conv.padding[1] == 0;
  flat_ = pointwise && conv.stride[0] == 1 && conv.stride[1] == 1 && x_.border == 0 &&
          out_.border == 0 && (!residual_.data || residual_.border == 0);
  copies_ = pointwise && conv.stride[1] * x_.pixel() >= kFarPixels;
  lines_ = flat_ ? 1 : images * out_.height;
  line_ = flat_ ? images * out_.height * out_.width : out_.width;
  tiles_per_line_ = ceil_div(line_, kTilePixels);
}

int64_t TiledConvolution::copied_stride() const {
  return ceil_div(x_.pixel(), kCacheLine) * kCacheLine + kCacheLine;
}

int64_t TiledConvolution::chunk() const {
  const int64_t tile = kTilePixels * conv_.stride[0] * conv_.stride[1] * x_.pixel();
  return std::clamp<int64_t>(kChunkBytes / tile, 2, kMaxChunk);
}

int64_t TiledConvolution::scratch_bytes() const {
  return copies_ ? chunk() * kTilePixels * copied_stride() : 0;
}

TiledConvolution::Site TiledConvolution::site(int64_t tile) const {
  const int64_t line = tile / tiles_per_line_, i = tile % tiles_per_line_;
  const int64_t first = line_ * i / tiles_per_line_, last = line_ * (i + 1) / tiles_per_line_;
  if (flat_) {
    return {x_.data + first * x_.pixel(),
            0,
            1,
            residual_.data ? residual_.data + first * residual_.pixel() : nullptr,
            out_.data + first * out_.pixel(),
            last - first};
  }
  const int64_t n = line / out_.height, y = line % out_.height;
  // The taps [begin, end) of a column fall on the image.
  const int64_t top = y * conv_.stride[0] - conv_.padding[0], step = conv_.dilation[0];
  const int64_t begin = std::min(conv_.kernel[0], ceil_div(std::max<int64_t>(0, -top), step));
  const int64_t inside = std::max<int64_t>(0, x_.height - top);
  const int64_t end = std::max(begin, std::min(conv_.kernel[0], ceil_div(inside, step)));
  return {x_.at(n, top + begin * step, first * conv_.stride[1] - conv_.padding[1]),
          begin,
          end - begin,
          residual_.data ? residual_.at(n, y, first) : nullptr,
          out_.at(n, y, first),
          last - first};
}

void TiledConvolution::run(Range tiles, Range panels, char* scratch) const {
  const int64_t pixel_words = x_.pixel() / kWord;
  ConvolutionTile t{};
  t.x_stride = copies_ ? copied_stride() : conv_.stride[1] * x_.pixel();
  // The taps of a row follow each other in memory unless they are dilated.
  const bool merged = conv_.dilation[1] == 1;
  t.taps_x = merged ? 1 : conv_.kernel[1];
  t.words = merged ? conv_.kernel[1] * pixel_words : pixel_words;
  t.tap_stride_x = conv_.dilation[1] * x_.pixel();
  t.tap_stride_y = conv_.dilation[0] * x_.row();
  t.residual_stride = residual_.pixel();
  t.out_stride = out_.pixel();
  t.floor = floor_;
  const int64_t tap_row_bytes = conv_.kernel[1] * pixel_words * kWord * kTileChannels;
  Site sites[kMaxChunk];
  const int64_t step = chunk();
  for (int64_t first = tiles.begin; first < tiles.end; first += step) {
    const int64_t count = std::min(step, tiles.end - first);
    for (int64_t i = 0; i < count; ++i) {
      sites[i] = site(first + i);
      if (!copies_) continue;
      char* copy = scratch + i * kTilePixels * copied_stride();
      for (int64_t p = 0; p < sites[i].pixels; ++p) {
        std::memcpy(copy + p * copied_stride(), sites[i].x + p * conv_.stride[1] * x_.pixel(),
                    x_.pixel());
      }
      sites[i].x = copy;
    }
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t channel_bytes = panel * kTileChannels * out_.element;
      t.shift = conv_.shift + panel * kTileChannels;
      for (int64_t i = 0; i < count; ++i) {
        const Site& s = sites[i];
        t.x = s.x;
        t.taps_y = s.taps_y;
        t.weight = conv_.weight + panel * conv_.panel_bytes() + s.first_tap_y * tap_row_bytes;
        t.residual = s.residual ? s.residual + channel_bytes : nullptr;
        t.out = s.out + channel_bytes;
        kernels_.convolution_tile[dtype_][s.pixels](t);
      }
    }
  }
}

}  // namespace resnet_fused::cpu
