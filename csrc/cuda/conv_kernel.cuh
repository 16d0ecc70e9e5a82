// The convolution kernel: which tile a block computes, and how the shares of a split are added.
#pragma once

#include <cstdint>

#include "cuda/conv.cuh"
#include "cuda/conv_epilogue.cuh"
#include "cuda/reduction.h"

namespace resnet_fused {

// Blocks that run at the same time share rows of the source, and columns of the weight: columns
// side by side first, of a band at most so many tiles wide.
constexpr int kBandTiles = 16;

// all_steps: of the sum of a tile, of which a split takes a share.
template <class Tile>
__device__ __forceinline__ Place place_of_block(const ConvParameters& p, const Phase& phase,
                                                int all_steps) {
  const int column_tiles = p.column_tiles * p.groups;
  const int of_band = p.row_tiles * kBandTiles;
  const int block = blockIdx.x;
  const int band = block / of_band;
  const int left = column_tiles - band * kBandTiles;
  const int width = left < kBandTiles ? left : kBandTiles;
  const int row_tile = (block - band * of_band) / width;
  const int column_tile = band * kBandTiles + (block - band * of_band) % width;
  Place place;
  place.first_row = row_tile * Tile::kM;
  place.group = column_tile / p.column_tiles;
  place.first_column = (column_tile - place.group * p.column_tiles) * Tile::kN;
  // The split's share of the steps, as even as can be.
  const int64_t steps = place.first_row < phase.pixels ? all_steps : 0;
  place.first_step = static_cast<int>(steps * blockIdx.y / gridDim.y);
  place.steps = static_cast<int>(steps * (blockIdx.y + 1) / gridDim.y) - place.first_step;
  return place;
}

// Whether this block is the last of its tile's splits, with the sums of all of them, added in their
// order. All threads call.
template <class Tile>
__device__ __forceinline__ bool add_splits(typename Tile::Sum& sum, const ConvParameters& p) {
  constexpr int kFragments = Tile::kFragmentsM * Tile::kFragmentsN;
  const int64_t tile = static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x;
  const int64_t tiles = static_cast<int64_t>(gridDim.x) * gridDim.z;
  const auto fragment = [&](int64_t split, int i, int j) {
    const int64_t at = (split * tiles + tile) * kFragments + i * Tile::kFragmentsN + j;
    return p.partial_sums + at * Tile::kThreads + threadIdx.x;
  };
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
      const float (&s)[4] = sum[i][j];
      store(fragment(blockIdx.y, i, j), float4{s[0], s[1], s[2], s[3]});
    }
  }
  RESNET_FUSED_SHARED(unsigned, flag, 1);
  if (!is_last_of_column(p.finished + tile, flag)) return false;
#pragma unroll
  for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[i][j][k] = 0;
    }
  }
#pragma unroll 1
  for (unsigned split = 0; split < gridDim.y; ++split) {
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; ++j) {
        const float4 other = load(fragment(split, i, j));
        sum[i][j][0] += other.x;
        sum[i][j][1] += other.y;
        sum[i][j][2] += other.z;
        sum[i][j][3] += other.w;
      }
    }
  }
  return true;
}

// A tile of the result, or the share of it of a split. Grid: tiles, splits, phases.
template <class Tile, class Prologue, class Epilogue, bool kTransposed>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResidentBlocks)
    conv_kernel(const __grid_constant__ ConvParameters p,
                const __grid_constant__ typename Prologue::Parameters prologue,
                const __grid_constant__ typename Epilogue::Parameters epilogue) {
  const Phase& phase = p.phases[blockIdx.z];
  const int steps = phase.rows.taps * phase.columns.taps * p.steps_of_tap;
  const Place place = place_of_block<Tile>(p, phase, steps);
  typename Tile::Sum sum{};
  Patches<Tile, Prologue, kTransposed> patches(p, phase, prologue, place);
  main_loop<Tile>(sum, patches, place.steps);
  if (gridDim.y > 1 && !add_splits<Tile>(sum, p)) return;
  const ResultTile<Tile> tile(p, phase, place);
  const int partial = blockIdx.z * p.row_tiles + place.first_row / Tile::kM;
  Epilogue::template apply<Tile>(sum, tile, epilogue, partial);
  tile.write(sum, p.result);
}

}  // namespace resnet_fused
