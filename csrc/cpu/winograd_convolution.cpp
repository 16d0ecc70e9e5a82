#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/direct_convolution.h"
#include "cpu/tensors.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kPositions = 16;
// Distance between tiles that avoids the sets of a cache that a power of two would share.
constexpr int64_t kGap = 64;
constexpr int64_t kTransformedBytes = 262144;
constexpr int64_t kProductStride = kTileChannels * sizeof(float);

// Three values to G g: (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2), `step` arrays apart.
void expand(const float* g0, const float* g1, const float* g2, float* out, int64_t step) {
  for (int64_t k = 0; k < kTileChannels; ++k) {
    const float ends = 0.5f * (g0[k] + g2[k]), middle = 0.5f * g1[k];
    out[k] = g0[k];
    out[step * kTileChannels + k] = ends + middle;
    out[2 * step * kTileChannels + k] = ends - middle;
    out[3 * step * kTileChannels + k] = g2[k];
  }
}

}  // namespace

WinogradConvolution::WinogradConvolution(const Kernels& kernels, const DirectConvolution& conv,
                                         const Activation& x, const Activation* residual,
                                         const Activation& out, int64_t images, bool relu)
    : kernels_(kernels),
      conv_(conv),
      x_(x),
      residual_(residual ? *residual : Activation{}),
      out_(out),
      floor_(relu ? 0.0f : -std::numeric_limits<float>::infinity()),
      tiles_per_row_(out.width / 2),
      tiles_per_image_(out.height / 2 * tiles_per_row_),
      tiles_(images * tiles_per_image_) {}

int64_t WinogradConvolution::parts() const { return ceil_div(tiles_, kTilePixels); }

int64_t WinogradConvolution::first_tile(int64_t part) const { return tiles_ * part / parts(); }

int64_t WinogradConvolution::transformed_stride() const { return x_.pixel() + kGap; }

int64_t WinogradConvolution::group() const {
  const int64_t part = kPositions * kTilePixels * transformed_stride();
  return std::clamp<int64_t>(kTransformedBytes / part, 2, 4);
}

int64_t WinogradConvolution::scratch_bytes() const {
  const int64_t tiles = group() * kTilePixels;
  return kPositions * tiles * (transformed_stride() + kProductStride) + tiles * kProductStride;
}

void WinogradConvolution::run(Range parts, Range panels, char* scratch) const {
  const int64_t most = group() * kTilePixels;
  char* products = scratch + kPositions * most * transformed_stride();
  float* sums = reinterpret_cast<float*>(products + kPositions * most * kProductStride);
  ConvolutionTile t{};
  t.x_stride = transformed_stride();
  t.rows = 1;
  const int64_t blocks = ceil_div(x_.channels, kBlockWords);
  static constexpr float kNoShift[kTileChannels] = {};
  t.shift = kNoShift;
  t.out_stride = kProductStride;
  t.floor = -std::numeric_limits<float>::infinity();
  for (int64_t begin = parts.begin; begin < parts.end; begin += group()) {
    const int64_t end = std::min(begin + group(), parts.end);
    const int64_t first = first_tile(begin), count = first_tile(end) - first;
    transform_input(first, count, scratch);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      t.weight = conv_.weight + panel * conv_.panel_bytes();
      for (int64_t i = 0; i < kPositions * blocks; ++i) {
        const int64_t position = i / blocks, block = i % blocks;
        const int64_t word = x_.channels * block / blocks;
        t.words = x_.channels * (block + 1) / blocks - word;
        t.first = block == 0;
        t.last = block == blocks - 1;
        for (int64_t part = begin; part < end; ++part) {
          const int64_t tile = first_tile(part);
          const int64_t row = position * count + tile - first;
          t.x = scratch + row * transformed_stride() + word * sizeof(float);
          t.sums = sums + (part - begin) * kTileSums;
          t.out = products + row * kProductStride;
          kernels_.convolution_tile[kFloat32][first_tile(part + 1) - tile](t);
        }
        t.weight += t.words * kProductStride;
      }
      transform_output(first, count, panel, products);
    }
  }
}

void WinogradConvolution::transform_input(int64_t first, int64_t count, char* transformed) const {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = (first + i) / tiles_per_image_, tile = (first + i) % tiles_per_image_;
    const int64_t y = 2 * (tile / tiles_per_row_), x = 2 * (tile % tiles_per_row_);
    kernels_.winograd_input({x_.at(n, y - conv_.padding[0], x - conv_.padding[1]), x_.row(),
                             x_.pixel(), x_.channels, transformed + i * transformed_stride(),
                             count * transformed_stride()});
  }
}

void WinogradConvolution::transform_output(int64_t first, int64_t count, int64_t panel,
                                           const char* products) const {
  const int64_t channel_bytes = panel * kProductStride;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = (first + i) / tiles_per_image_, tile = (first + i) % tiles_per_image_;
    const int64_t y = 2 * (tile / tiles_per_row_), x = 2 * (tile % tiles_per_row_);
    const char* residual = residual_.data ? residual_.at(n, y, x) + channel_bytes : nullptr;
    kernels_.winograd_output({products + i * kProductStride, count * kProductStride,
                              conv_.shift + panel * kTileChannels, residual, residual_.row(),
                              residual_.pixel(), out_.at(n, y, x) + channel_bytes, out_.row(),
                              out_.pixel(), floor_});
  }
}

void WinogradWeight::pack(float* packed) const {
  const int64_t panels = out_channels / kTileChannels;
  torch::stable::parallel_for(0, panels * in_channels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / in_channels, in = i % in_channels;
      float taps[3][3][kTileChannels], rows[4][3][kTileChannels];
      for (int64_t k = 0; k < kTileChannels; ++k) {
        const float* w = data + (panel * kTileChannels + k) * out_stride + in * in_stride;
        for (int64_t y = 0; y < 3; ++y) {
          for (int64_t x = 0; x < 3; ++x) taps[y][x][k] = w[y * row_stride + x * column_stride];
        }
      }
      for (int64_t x = 0; x < 3; ++x) expand(taps[0][x], taps[1][x], taps[2][x], rows[0][x], 3);
      float* out = packed + panel * kPositions * in_channels * kTileChannels + in * kTileChannels;
      for (int64_t y = 0; y < 4; ++y) {
        float columns[4][kTileChannels];
        expand(rows[y][0], rows[y][1], rows[y][2], columns[0], 1);
        for (int64_t x = 0; x < 4; ++x) {
          std::memcpy(out + (4 * y + x) * in_channels * kTileChannels, columns[x], kProductStride);
        }
      }
    }
  });
}

}  // namespace resnet_fused::cpu
