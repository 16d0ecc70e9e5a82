// What the tiles of a convolution leave behind for each channel, put together in a fixed order.
#pragma once

#include <cstdint>
#include <utility>

#include "common/checks.h"

namespace resnet_fused {

// (mean, m2) of all pixels, (K,), of means and m2s (tiles, K): the first tiles have tile_pixels.
std::pair<Tensor, Tensor> combine_statistics(const Tensor& means, const Tensor& m2s, int64_t pixels,
                                             int64_t tile_pixels);

// Sums over tiles of both, (tiles, C) -> (C,).
std::pair<Tensor, Tensor> sum_over_tiles(const Tensor& first, const Tensor& second);

}  // namespace resnet_fused
