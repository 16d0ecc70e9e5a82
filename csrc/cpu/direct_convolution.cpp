#include "cpu/direct_convolution.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/tensors.h"

namespace resnet_fused::cpu {
namespace {

constexpr int64_t kWord = 4;
constexpr int64_t kCacheLine = 64;
// Pixels this far apart start to share the sets of a first-level cache of 64 sets.
constexpr int64_t kFarPixels = 1024;
// Input that meets all weights before the next input does: little where the weights stay in a
// second-level cache beside it, more where they have to come from further away each time.
constexpr int64_t kSmallWeights = 1048576;
constexpr int64_t kChunkBytes = 131072;
constexpr int64_t kLargeChunkBytes = 524288;

}  // namespace

char* Buffer::of_size(int64_t bytes) {
  if (bytes > size_) {
    memory_ = Tensor();
    memory_ = empty_vector(bytes + kCacheLine, aoti_torch_dtype_uint8());
    size_ = bytes;
    const auto address = reinterpret_cast<uintptr_t>(memory_.mutable_data_ptr());
    data_ = reinterpret_cast<char*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
  }
  return data_;
}

void clear_border(const Activation& a, int64_t images) {
  if (a.border == 0) return;
  const int64_t side = a.border * a.pixel();
  for (int64_t n = 0; n < images; ++n) {
    char* image = a.data + n * a.image();
    std::memset(image, 0, a.border * a.row());
    for (int64_t y = a.border; y < a.height + a.border; ++y) {
      std::memset(image + y * a.row(), 0, side);
      std::memset(image + (y + 1) * a.row() - side, 0, side);
    }
    std::memset(image + (a.height + a.border) * a.row(), 0, a.border * a.row());
  }
}

void copy_into_border(const Activation& x, const Activation& copy, int64_t images) {
  clear_border(copy, images);
  const int64_t line_bytes = x.width * x.pixel();
  torch::stable::parallel_for(0, images * x.height, std::max<int64_t>(1, kGrain / line_bytes),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t line = begin; line < end; ++line) {
                                  const int64_t n = line / x.height, y = line % x.height;
                                  std::memcpy(copy.at(n, y, 0), x.at(n, y, 0), line_bytes);
                                }
                              });
}

void run_shared(const ConvolutionParts& work, const DirectConvolution& conv, int64_t x_bytes,
                std::vector<Buffer>& scratches) {
  const Range parts{0, work.parts()}, panels{0, conv.panels()};
  // Threads share what is larger: each reads its part of it, and all of the other.
  const bool splits_panels = conv.weight_bytes() > x_bytes || parts.end == 1;
  const int64_t total = splits_panels ? panels.end : parts.end;
  const int64_t threads = static_cast<int64_t>(scratches.size());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Range share{total * i / threads, total * (i + 1) / threads};
      work.run(splits_panels ? parts : share, splits_panels ? share : panels,
               scratches[i].of_size(work.scratch_bytes()));
    }
  });
}

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
  const int64_t reach = copies_ ? 1 : conv_.stride[0] * conv_.stride[1];
  const int64_t tile = ceil_div(line_, tiles_per_line_) * reach * x_.pixel();
  const int64_t bytes = conv_.weight_bytes() > kSmallWeights ? kLargeChunkBytes : kChunkBytes;
  return std::clamp<int64_t>(bytes / tile, 2, kMaxChunk);
}

int64_t TiledConvolution::scratch_bytes() const {
  const int64_t copies = copies_ ? kTilePixels * copied_stride() : 0;
  return chunk() * (kTileSums * sizeof(float) + copies);
}

TiledConvolution::Site TiledConvolution::site(int64_t tile) const {
  const int64_t line = tile / tiles_per_line_, i = tile % tiles_per_line_;
  const int64_t first = line_ * i / tiles_per_line_, last = line_ * (i + 1) / tiles_per_line_;
  if (flat_) {
    return {x_.data + first * x_.pixel(),
            {0, 1},
            residual_.data ? residual_.data + first * residual_.pixel() : nullptr,
            out_.data + first * out_.pixel(),
            last - first};
  }
  const int64_t n = line / out_.height, y = line % out_.height;
  // The taps [begin, end) of a column fall on the image; where none does, one in the border.
  const int64_t top = y * conv_.stride[0] - conv_.padding[0], step = conv_.dilation[0];
  const int64_t begin = std::min(conv_.kernel[0] - 1, ceil_div(std::max<int64_t>(0, -top), step));
  const int64_t inside = std::max<int64_t>(0, x_.height - top);
  const int64_t end = std::max(begin + 1, std::min(conv_.kernel[0], ceil_div(inside, step)));
  return {x_.at(n, top + begin * step, first * conv_.stride[1] - conv_.padding[1]),
          {begin, end},
          residual_.data ? residual_.at(n, y, first) : nullptr,
          out_.at(n, y, first),
          last - first};
}

void TiledConvolution::run(Range tiles, Range panels, char* scratch) const {
  // The taps of a row follow each other in memory unless they are dilated.
  const bool merged = conv_.dilation[1] == 1;
  const int64_t segments = merged ? 1 : conv_.kernel[1];
  const int64_t segment_words = conv_.kernel[1] / segments * x_.pixel() / kWord;
  // Long segments are cut into blocks, short ones taken together over several rows of the kernel.
  const int64_t blocks = ceil_div(segment_words, kBlockWords);
  const int64_t most_rows = segments == 1 ? std::max<int64_t>(1, kBlockWords / segment_words) : 1;
  const int64_t row_groups = ceil_div(conv_.kernel[0], most_rows), parts = segments * blocks;
  ConvolutionTile t{};
  t.x_stride = copies_ ? copied_stride() : conv_.stride[1] * x_.pixel();
  t.row_stride = conv_.dilation[0] * x_.row();
  t.residual_stride = residual_.pixel();
  t.out_stride = out_.pixel();
  t.floor = floor_;
  const int64_t step = chunk();
  float* sums = reinterpret_cast<float*>(scratch);
  char* copies = scratch + step * kTileSums * sizeof(float);
  Site sites[kMaxChunk];
  for (int64_t first = tiles.begin; first < tiles.end; first += step) {
    const int64_t count = std::min(step, tiles.end - first);
    for (int64_t i = 0; i < count; ++i) {
      sites[i] = site(first + i);
      if (copies_) copy_pixels(sites[i], copies + i * kTilePixels * copied_stride());
    }
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t channel_bytes = panel * kTileChannels * out_.element;
      t.shift = conv_.shift + panel * kTileChannels;
      const char* weight = conv_.weight + panel * conv_.panel_bytes();
      // The weights of one part for all tiles, then those of the next.
      for (int64_t i = 0; i < row_groups * parts; ++i) {
        const int64_t group = i / parts, part = i % parts;
        const Range rows{conv_.kernel[0] * group / row_groups,
                         conv_.kernel[0] * (group + 1) / row_groups};
        const int64_t segment = part / blocks, block = part % blocks;
        const int64_t first_word = segment_words * block / blocks;
        t.words = segment_words * (block + 1) / blocks - first_word;
        const int64_t offset = segment * conv_.dilation[1] * x_.pixel() + first_word * kWord;
        const int64_t row_weights = t.words * kWord * kTileChannels;
        for (int64_t j = 0; j < count; ++j) {
          const Site& s = sites[j];
          const int64_t begin = std::max(rows.begin, s.taps.begin);
          const int64_t end = std::min(rows.end, s.taps.end);
          if (begin >= end) continue;
          t.rows = end - begin;
          t.x = s.x + (begin - s.taps.begin) * t.row_stride + offset;
          t.weight = weight + (begin - rows.begin) * row_weights;
          t.sums = sums + j * kTileSums;
          t.first = begin == s.taps.begin && part == 0;
          t.last = end == s.taps.end && part == parts - 1;
          t.residual = s.residual ? s.residual + channel_bytes : nullptr;
          t.out = s.out + channel_bytes;
          kernels_.convolution_tile[dtype_][s.pixels](t);
        }
        weight += (rows.end - rows.begin) * row_weights;
      }
    }
  }
}

// Brings the pixels of a tile close to each other.
void TiledConvolution::copy_pixels(Site& site, char* copy) const {
  for (int64_t i = 0; i < site.pixels; ++i) {
    std::memcpy(copy + i * copied_stride(), site.x + i * conv_.stride[1] * x_.pixel(), x_.pixel());
  }
  site.x = copy;
}

}  // namespace resnet_fused::cpu
