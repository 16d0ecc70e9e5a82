// Residual blocks in inference by direct convolutions, with or without the stem before them. Every
// thread takes images of its own through the whole network, the early layers one image at a time,
// so that activations stay in its caches; nothing but the output is allocated per layer.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/direct_convolution.h"
#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr const char* kOp = "direct_network";
// Numbers that describe a convolution: padding, stride and dilation of both axes, Winograd or not.
constexpr int64_t kNumbers = 7;
// Images that go through the late layers together: each weight is then read once for all of them.
constexpr int64_t kImagesTogether = 8;

struct Block {
  std::vector<DirectConvolution> convolutions;
  std::optional<DirectConvolution> projection;

  int64_t weight_bytes() const {
    int64_t bytes = projection ? projection->weight_bytes() : 0;
    for (const DirectConvolution& conv : convolutions) bytes += conv.weight_bytes();
    return bytes;
  }
};

struct Network {
  const Kernels& kernels;
  DType dtype;
  int64_t element;
  std::optional<DirectConvolution> stem;
  std::vector<Block> blocks;

  // Shape only; no data.
  Activation after(const DirectConvolution& conv, const Activation& x) const {
    STD_TORCH_CHECK(conv.out_size(x.height, 0) > 0 && conv.out_size(x.width, 1) > 0, kOp,
                    ": images of ", x.height, "x", x.width, " are too small for the kernel");
    return {nullptr, conv.out_size(x.height, 0), conv.out_size(x.width, 1), conv.out_channels, 0,
            element};
  }
  Activation after(const Block& block, Activation x) const {
    for (const DirectConvolution& conv : block.convolutions) x = after(conv, x);
    return x;
  }
  // The border that the input of block i needs.
  int64_t border_of(size_t i) const {
    if (i == blocks.size()) return 0;
    const Block& block = blocks[i];
    const int64_t border = block.convolutions.front().border();
    return block.projection ? std::max(border, block.projection->border()) : border;
  }
};

// Images through a network, by one thread or by several that share each convolution.
class Runner {
 public:
  // threads: how many work on each convolution; 1 if this is one of several runners.
  Runner(const Network& network, int64_t threads) : net_(network), scratches_(threads) {}

  // x and out have no border.
  void run(const Activation& x, const Activation& out, int64_t images) {
    for (int64_t first = 0; first < images; first += kImagesTogether) {
      const int64_t count = std::min(kImagesTogether, images - first);
      run_group(x.from_image(first), out.from_image(first), count);
    }
  }

 private:
  void run_group(const Activation& x, const Activation& out, int64_t images) {
    Activation late = net_.stem ? pooled_shape(x) : x;
    late.data = nullptr;
    size_t early = 0;
    // Early: where an image is larger than the weights that it meets.
    for (; early < net_.blocks.size(); ++early) {
      const Activation next = net_.after(net_.blocks[early], late);
      if (late.image() + next.image() < net_.blocks[early].weight_bytes()) break;
      late = next;
    }
    if (early == 0 && !net_.stem) {
      return run_blocks(0, net_.blocks.size(), x, false, out, images);
    }
    if (early == net_.blocks.size()) {
      for (int64_t n = 0; n < images; ++n) run_early(early, x.from_image(n), out.from_image(n));
      return;
    }
    late.border = net_.border_of(early);
    late.data = between_.of_size(images * late.image());
    for (int64_t n = 0; n < images; ++n) {
      clear_border(late.from_image(n), 1);
      run_early(early, x.from_image(n), late.from_image(n));
    }
    run_blocks(early, net_.blocks.size(), late, true, out, images);
  }

  void run_early(size_t blocks, const Activation& x, const Activation& out) {
    if (!net_.stem) return run_blocks(0, blocks, x, false, out, 1);
    if (blocks == 0) return run_stem(x, out);
    Activation pooled = pooled_shape(x);
    pooled.border = net_.border_of(0);
    pooled.data = pooled_.of_size(pooled.image());
    clear_border(pooled, 1);
    run_stem(x, pooled);
    run_blocks(0, blocks, pooled, true, out, 1);
  }

  // own: whether x may be overwritten.
  void run_blocks(size_t begin, size_t end, Activation x, bool own, const Activation& out,
                  int64_t images) {
    if (x.border < net_.border_of(begin)) {
      x = with_border(x, net_.border_of(begin), images);
      own = true;
    }
    for (size_t i = begin; i < end; ++i) {
      const Block& block = net_.blocks[i];
      Activation next = net_.after(block, x);
      next.border = net_.border_of(i + 1);
      if (i + 1 == end) {
        next = out;
      } else if (!block.projection && own && next.border == x.border &&
                 block.convolutions.size() > 1) {
        next = x;  // the sum takes the place of the residual, which nothing else reads any more
      } else {
        Buffer& buffer = main_[0].holds(x.data) ? main_[1] : main_[0];
        next.data = buffer.of_size(images * next.image());
        clear_border(next, images);
      }
      run_block(block, x, next, images);
      x = next;
      own = true;
    }
  }

  void run_block(const Block& block, const Activation& x, const Activation& out, int64_t images) {
    if (block.projection) convolve(*block.projection, x, nullptr, out, images, false);
    Activation z = x;
    for (size_t i = 0; i + 1 < block.convolutions.size(); ++i) {
      Activation next = net_.after(block.convolutions[i], z);
      next.border = block.convolutions[i + 1].border();
      next.data = inner_[i % 2].of_size(images * next.image());
      clear_border(next, images);
      convolve(block.convolutions[i], z, nullptr, next, images, true);
      z = next;
    }
    convolve(block.convolutions.back(), z, block.projection ? &out : &x, out, images, true);
  }

  void convolve(const DirectConvolution& conv, const Activation& x, const Activation* residual,
                const Activation& out, int64_t images, bool relu) {
    if (conv.winograd) {
      run_parts(WinogradConvolution(net_.kernels, conv, x, residual, out, images, relu), conv,
                images * x.image());
    } else {
      run_parts(TiledConvolution(net_.kernels, net_.dtype, conv, x, residual, out, images, relu),
                conv, images * x.image());
    }
  }

  void run_parts(const ConvolutionParts& work, const DirectConvolution& conv, int64_t x_bytes) {
    if (scratches_.size() == 1) {
      char* scratch = scratches_[0].of_size(work.scratch_bytes());
      return work.run({0, work.parts()}, {0, conv.panels()}, scratch);
    }
    run_shared(work, conv, x_bytes, scratches_);
  }

  Activation with_border(const Activation& x, int64_t border, int64_t images) {
    Activation copy = x;
    copy.border = border;
    copy.data = bordered_.of_size(images * copy.image());
    copy_into_border(x, copy, images);
    return copy;
  }

  Activation pooled_shape(const Activation& x) const {
    Activation a = net_.after(*net_.stem, x);
    a.height = (a.height - 1) / 2 + 1;
    a.width = (a.width - 1) / 2 + 1;
    return a;
  }

  // One image through the stem: convolution, ReLU and max pooling.
  void run_stem(const Activation& x, const Activation& out) {
    const DirectConvolution& stem = *net_.stem;
    Activation padded = x;
    padded.channels = stem.in_channels;
    padded.border = stem.border();
    padded.data = bordered_.of_size(padded.image());
    clear_border(padded, 1);
    for_each(x.height, [&](int64_t y) { copy_pixels(x, padded, y); });
    Activation wide = net_.after(stem, padded);
    // Behind a ReLU zeros never win: the border is padding of the pool.
    wide.border = 1;
    wide.data = inner_[0].of_size(wide.image());
    clear_border(wide, 1);
    convolve(stem, padded, nullptr, wide, 1, true);
    for_each(out.height, [&](int64_t y) {
      net_.kernels.max_pool_row[net_.dtype](
          {wide.at(0, 2 * y - 1, -1), wide.row(), out.width, out.channels, out.at(0, y, 0)});
    });
  }

  // Row y of an image, each pixel filled up with zeros.
  void copy_pixels(const Activation& x, const Activation& padded, int64_t y) const {
    const char* from = x.at(0, y, 0);
    char* to = padded.at(0, y, 0);
    if (x.pixel() == padded.pixel()) {
      std::memcpy(to, from, x.width * x.pixel());
      return;
    }
    std::memset(to, 0, x.width * padded.pixel());
    for (int64_t i = 0; i < x.width; ++i) {
      std::memcpy(to + i * padded.pixel(), from + i * x.pixel(), x.pixel());
    }
  }

  template <class Body>
  void for_each(int64_t count, const Body& body) {
    if (scratches_.size() == 1) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }

  const Network& net_;
  Buffer bordered_, pooled_, between_, main_[2], inner_[2];
  std::vector<Buffer> scratches_;
};

DirectConvolution describe(const Tensor& weight, const Tensor& shift, const int64_t* numbers,
                           ScalarType dtype, int64_t element) {
  STD_TORCH_CHECK(weight.dim() == 5 && weight.is_contiguous() && weight.scalar_type() == dtype &&
                      weight.size(4) == kTileChannels && weight.size(3) * element % 4 == 0,
                  kOp, ": weights must be packed for x");
  STD_TORCH_CHECK(shift.is_contiguous() && shift.scalar_type() == ScalarType::Float &&
                      shift.numel() == weight.size(0) * kTileChannels,
                  kOp, ": shifts must be float32, one for each output channel");
  for (int64_t i = 0; i < kNumbers - 1; ++i) {
    STD_TORCH_CHECK(numbers[i] >= (i < 2 ? 0 : 1), kOp,
                    ": stride and dilation must be positive, padding not negative");
  }
  DirectConvolution conv{static_cast<const char*>(weight.const_data_ptr()),
                         static_cast<const float*>(shift.const_data_ptr()),
                         weight.size(3),
                         weight.size(0) * kTileChannels,
                         element,
                         {weight.size(1), weight.size(2)},
                         {numbers[0], numbers[1]},
                         {numbers[2], numbers[3]},
                         {numbers[4], numbers[5]},
                         numbers[6] != 0};
  if (conv.winograd) {
    STD_TORCH_CHECK(dtype == ScalarType::Float && conv.kernel[0] == 4 && conv.kernel[1] == 4, kOp,
                    ": weights for Winograd's algorithm must be float32 and 4x4");
    STD_TORCH_CHECK(conv.stride[0] == 1 && conv.stride[1] == 1 && conv.dilation[0] == 1 &&
                        conv.dilation[1] == 1,
                    kOp, ": Winograd's algorithm needs stride 1 and dilation 1");
    conv.kernel[0] = conv.kernel[1] = 3;
  }
  return conv;
}

// x: (N, C, H, W), channels_last. weights, shifts, geometry: one entry (7 numbers) per convolution,
// in order, the projection of a block's shortcut behind its other convolutions. With stem the first
// convolution stands before the blocks and ends in ReLU and a 3x3 max pooling of stride 2 and
// padding 1. convolutions: how many each block has, without the projection; projections: 1 or 0.
Tensor direct_network(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> shifts,
                      std::vector<int64_t> geometry, std::vector<int64_t> convolutions,
                      std::vector<int64_t> projections, bool stem) {
  check_4d(kOp, "x", x);
  const DType dtype = dtype_of(kOp, "x", x);
  const Kernels& table = kernels();
  STD_TORCH_CHECK(table.convolution_tile[dtype][1] != nullptr, kOp,
                  ": this CPU has no inner loop for the dtype of x");
  STD_TORCH_CHECK(is_channels_last(x), kOp, ": x must be channels_last");
  const int64_t element = dtype == kFloat32 ? 4 : 2;
  size_t total = stem ? 1 : 0;
  STD_TORCH_CHECK(projections.size() == convolutions.size() && !convolutions.empty(), kOp,
                  ": projections must have one number per block, got ", projections.size(), " for ",
                  convolutions.size());
  for (size_t i = 0; i < convolutions.size(); ++i) {
    STD_TORCH_CHECK(convolutions[i] > 0 && (projections[i] | 1) == 1, kOp,
                    ": every block must have a convolution and at most one projection, got ",
                    convolutions[i], " and ", projections[i]);
    total += convolutions[i] + projections[i];
  }
  STD_TORCH_CHECK(
      total == weights.size() && total == shifts.size() && geometry.size() == kNumbers * total, kOp,
      ": weights, shifts and geometry must describe ", total, " convolutions, got ", weights.size(),
      ", ", shifts.size(), " and ", geometry.size(), " numbers");
  size_t next = 0;
  const auto take = [&] {
    const size_t i = next++;
    return describe(weights[i], shifts[i], geometry.data() + kNumbers * i, x.scalar_type(),
                    element);
  };
  Network network{table, dtype, element, std::nullopt, {}};
  Activation in{static_cast<char*>(const_cast<void*>(x.const_data_ptr())),
                x.size(2),
                x.size(3),
                x.size(1),
                0,
                element};
  Activation shape = in;
  if (stem) {
    network.stem = take();
    STD_TORCH_CHECK(network.stem->in_channels >= in.channels, kOp,
                    ": weights of the stem must take ", in.channels, " channels, got ",
                    network.stem->in_channels);
    shape = network.after(*network.stem, shape);
    shape.height = (shape.height - 1) / 2 + 1;
    shape.width = (shape.width - 1) / 2 + 1;
  }
  for (size_t i = 0; i < convolutions.size(); ++i) {
    Block block;
    Activation inside = shape;
    for (int64_t c = 0; c < convolutions[i]; ++c) {
      block.convolutions.push_back(take());
      const DirectConvolution& conv = block.convolutions.back();
      STD_TORCH_CHECK(conv.in_channels == inside.channels, kOp,
                      ": the channels of one convolution must be those of the next");
      inside = network.after(conv, inside);
      STD_TORCH_CHECK(!conv.winograd || (inside.height % 2 == 0 && inside.width % 2 == 0), kOp,
                      ": Winograd's algorithm needs outputs of even height and width");
    }
    if (projections[i]) {
      block.projection = take();
      STD_TORCH_CHECK(block.projection->in_channels == shape.channels, kOp,
                      ": the projection must take the channels of its block's input");
    }
    const Activation residual = block.projection ? network.after(*block.projection, shape) : shape;
    STD_TORCH_CHECK(residual.height == inside.height && residual.width == inside.width &&
                        residual.channels == inside.channels,
                    kOp, ": the shortcut of a block must have the shape of its output");
    shape = inside;
    network.blocks.push_back(std::move(block));
  }
  const int64_t batch = x.size(0);
  const int64_t sizes[] = {batch, shape.channels, shape.height, shape.width};
  const int64_t strides[] = {shape.image() / element, 1, shape.row() / element, shape.channels};
  const Tensor result = empty_strided(sizes, strides, dtype_code(x));
  Activation out = shape;
  out.data = static_cast<char*>(result.mutable_data_ptr());
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = (threads > 1) ? batch / threads : 0;
  if (share > 0) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Runner(network, 1).run(in.from_image(i * share), out.from_image(i * share), share);
      }
    });
  }
  const int64_t done = threads * share;
  Runner(network, threads).run(in.from_image(done), out.from_image(done), batch - done);
  return result;
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CPU, m) {
  m.impl("direct_network", TORCH_BOX(&resnet_fused::cpu::direct_network));
}
