// Every instance of the bottleneck kernel, with the pixels that a step of a block has: 32 for each
// warp, so that a fragment of weights serves two tiles of rows, where that leaves registers.
#pragma once

#include "cuda/bottleneck.cuh"

namespace resnet_fused {

template <class T, class Part, int kMiddle>
struct LargeChain;

// 128 pixels; two blocks, of which one multiplies while the other one reads or stores.
template <class T, class Part>
struct LargeChain<T, Part, 64> {
  using Type = Chain<T, Part, 64, 4, 2, 2>;
};

// 256 pixels, for which all weights stream through shared memory once.
template <class T>
struct LargeChain<T, Tail, 128> {
  using Type = Chain<T, Tail, 128, 8, 2, 1>;
};

// 128 pixels. Two tiles of rows for each warp would spill: y2, the sums of next_y1 and those of out
// are 256 registers.
template <class T>
struct LargeChain<T, Roll, 128> {
  using Type = Chain<T, Roll, 128, 8, 1, 1>;
};

// 128 pixels. With two tiles of rows for each warp, the sums alone would fill the registers.
template <class T>
struct LargeChain<T, Tail, 256> {
  using Type = Chain<T, Tail, 256, 8, 1, 1>;
};

template <class T, class Part, int kMiddle>
using LargeChainOf = typename LargeChain<T, Part, kMiddle>::Type;

// For small batches: steps of 64 pixels, which are more.
template <class T, class Part, int kMiddle>
using SmallChainOf = Chain<T, Part, kMiddle, 4, 1, 2>;

}  // namespace resnet_fused
