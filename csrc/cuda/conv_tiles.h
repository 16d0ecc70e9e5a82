// Every instance of the convolution kernels: for each arithmetic, and for what stands before the
// product, the tiles, from large ones, which read the least, to small ones, for problems that would
// leave multiprocessors idle.
//
// bfloat16, float16: a tile of 128 x 128 reads 1 byte for 64 multiplications. More than 64 x 64 for
// a warp does not fit into its registers, and 128 threads leave room for a second block, which
// multiplies while the first one reads or stores. A prologue needs registers, too: smaller parts of
// a tile for a warp, or fewer blocks. float32: fragments are rounded or split in registers, so that
// tiles end at 128 x 64.
#pragma once

#include <cstdint>
#include <tuple>

#include "cuda/conv.cuh"

namespace resnet_fused {

template <class T, class Math, class Prologue>
struct TileList {
  using Types = std::tuple<Tile<T, Math, 128, 128, 64, 32, 4, 1>,  // many channels, many pixels
                           Tile<T, Math, 128, 64, 64, 32, 4, 2>,   // 64 channels, or fewer tiles
                           Tile<T, Math, 64, 64, 32, 32, 4, 3>>;   // small grids
};

template <class T, class Math>
struct TileList<T, Math, Identity> {
  using Types =
      std::tuple<Tile<T, Math, 128, 128, 64, 64, 4, 2>, Tile<T, Math, 128, 64, 64, 32, 4, 3>,
                 Tile<T, Math, 64, 64, 32, 32, 4, 4>>;
};

template <class Math, class Prologue>
struct TileList<float, Math, Prologue> {
  using Types =
      std::tuple<Tile<float, Math, 128, 64, 64, 32, 4, 2>, Tile<float, Math, 64, 64, 32, 32, 4, 3>>;
};

template <class Math>
struct TileList<float, Math, Identity> : TileList<float, Math, ScaleShiftRelu> {};

template <class Prologue>
struct TileList<float, SplitTf32, Prologue> {
  using Types = std::tuple<Tile<float, SplitTf32, 128, 64, 32, 32, 4, 1>,
                           Tile<float, SplitTf32, 64, 64, 32, 32, 4, 2>>;
};

template <>
struct TileList<float, SplitTf32, Identity> : TileList<float, SplitTf32, ScaleShiftRelu> {};

template <class T, class Math, class Prologue>
using TilesOf = typename TileList<T, Math, Prologue>::Types;

}  // namespace resnet_fused
