// From the sizes of a convolution to the launch of one instance of its kernel.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/conv_kernel.cuh"
#include "cuda/conv_operands.h"
#include "cuda/conv_tiles.h"

namespace resnet_fused {

// Calls body(T{}, std::type_identity<Math>{}): bfloat16 and float16 as they are, float32 with
// TF32's precision or its own.
template <class Body>
void dispatch_arithmetic(const char* op, const Tensor& x, bool tf32, Body&& body) {
  dispatch_up_to_float32(op, "x", x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, float>) {
      body(element, std::type_identity<T>{});
    } else if (tf32) {
      body(element, std::type_identity<ptx::Tf32>{});
    } else {
      body(element, std::type_identity<SplitTf32>{});
    }
  });
}

// What the choice of a tile depends on.
struct TileShape {
  int m, n, resident_blocks;
};

template <class Types>
constexpr auto shapes_of() {
  return []<class... Tiles>(std::type_identity<std::tuple<Tiles...>>) {
    return std::array<TileShape, sizeof...(Tiles)>{
        TileShape{Tiles::kM, Tiles::kN, Tiles::kResidentBlocks}...};
  }(std::type_identity<Types>{});
}

// Calls body(Tile{}) with the type at `index`.
template <class Types, class Body>
void visit_tile(int index, Body&& body) {
  [&]<size_t... kIndices>(std::index_sequence<kIndices...>) {
    ((index == static_cast<int>(kIndices) ? body(std::tuple_element_t<kIndices, Types>{}) : void()),
     ...);
  }(std::make_index_sequence<std::tuple_size_v<Types>>{});
}

// tile: index in TilesOf; splits: of the sum over taps and channels.
struct Choice {
  int tile = 0;
  int splits = 1;
  int64_t row_tiles = 0, column_tiles = 0;
};

// The largest tiles that give every multiprocessor one, else the smallest; then the sum is split as
// long as each part has kLeastSteps. wanted: what is not to be chosen but taken, where not negative
// (tile) or 0 (splits).
template <class Types>
Choice choose_tile(const char* op, const std::vector<Phase>& phases, int64_t groups,
                   int64_t columns, int64_t steps, int device, Choice wanted) {
  constexpr int64_t kLeastSteps = 8, kMaxSplits = 16;
  constexpr auto kShapes = shapes_of<Types>();
  const int64_t multiprocessors = multiprocessor_count(device);
  Choice choice;
  int64_t tiles = 0;
  for (choice.tile = 0; choice.tile < static_cast<int>(kShapes.size()); ++choice.tile) {
    const TileShape& shape = kShapes[choice.tile];
    choice.column_tiles = ceil_div(columns, shape.n);
    choice.row_tiles = tiles = 0;
    for (const Phase& phase : phases) {
      const int64_t row_tiles = ceil_div(phase.pixels, shape.m);
      choice.row_tiles = std::max(choice.row_tiles, row_tiles);
      tiles += row_tiles * choice.column_tiles * groups;
    }
    const bool is_last = choice.tile + 1 == static_cast<int>(kShapes.size());
    const bool is_narrow = columns <= shape.n / 2;
    if (wanted.tile >= 0 ? choice.tile == wanted.tile
                         : is_last || (!is_narrow && tiles >= multiprocessors)) {
      break;
    }
  }
  RESNET_FUSED_CHECK(choice.tile < static_cast<int>(kShapes.size()), op,
                     ": tile must be less than ", kShapes.size(), ", got ", wanted.tile);
  const int64_t most = std::clamp(steps / kLeastSteps, int64_t{1}, kMaxSplits);
  choice.splits =
      static_cast<int>(std::clamp(multiprocessors / std::max<int64_t>(tiles, 1), int64_t{1}, most));
  if (wanted.splits > 0) choice.splits = wanted.splits;
  return choice;
}

// The most steps of a phase.
inline int64_t steps_of(const ConvParameters& p, const std::vector<Phase>& phases) {
  int64_t steps = 0;
  for (const Phase& phase : phases) {
    steps = std::max<int64_t>(steps, int64_t{phase.rows.taps} * phase.columns.taps);
  }
  return steps * p.steps_of_tap;
}

template <class Tile, class Source, class Epilogue>
constexpr size_t shared_bytes() {
  constexpr size_t kLoop = Tile::kStages * Source::kStageBytes;
  constexpr size_t kEnd =
      ResultTile<Tile>::kBytes + ColumnSums<Tile, std::max(Epilogue::kSums, 1)>::kBytes;
  return std::max(kLoop, kEnd);
}

inline Choice wanted_choice(int64_t tile, int64_t splits) {
  Choice wanted;
  wanted.tile = static_cast<int>(tile);
  wanted.splits = static_cast<int>(splits);
  return wanted;
}

// (N, C, H, W) in channels_last, on the device of x and in its dtype.
inline Tensor allocate_result(const Tensor& x, int64_t n, int64_t c, int64_t h, int64_t w) {
  const std::array<int64_t, 4> sizes = {n, c, h, w};
  const std::array<int64_t, 4> strides = {h * w * c, 1, w * c, c};
  return allocate_like(x, sizes, strides, dtype_code(x));
}

// (tiles, channels) in float32.
inline Tensor allocate_partials(const Tensor& x, int64_t tiles, int64_t channels) {
  const std::array<int64_t, 2> sizes = {tiles, channels}, strides = {channels, 1};
  return allocate_like(x, sizes, strides, aoti_torch_dtype_float32());
}

// The forward of a convolution as the kernels are given it, and what they read. scale: of the
// kernels of weight, (K,), or none.
template <class T>
struct ForwardProblem {
  Tensor source, weight;
  ConvParameters parameters{};  // without the result and what depends on tiles
  std::vector<Phase> phases;

  ForwardProblem(const char* op, const Tensor& x, const Tensor& weight, Convolution conv,
                 Grouping grouping, const OptionalTensor& scale)
      : weight(packed_weight(op, weight, x, conv, grouping, scale)) {
    constexpr int64_t kStepChannels = kStepBytes / sizeof(T);
    check_sizes(op, conv, grouping);
    const bool joins = grouping.groups == 1 && conv.s > 1 && conv.dilation[1] == 1 &&
                       2 * grouping.padded_channels <= kStepChannels;
    source = with_padded_groups(op, x, grouping.groups, grouping.channels, grouping.padded_channels,
                                joins ? conv.padding[1] : 0);
    if (joins) join_row_taps(conv, grouping);
    parameters = forward_parameters(conv, grouping, kStepChannels);
    phases = forward_phases(conv, grouping, kStepChannels);
    parameters.source = source.const_data_ptr();
    parameters.weight = this->weight.const_data_ptr();
  }
};

// Calls launch(parameters, grid, stream) for all phases, a few at a time. x: any tensor on the
// device.
template <class Tile, class Launch>
void launch_tiles(const Tensor& x, ConvParameters p, const std::vector<Phase>& phases,
                  const Choice& choice, Launch launch) {
  const cudaStream_t stream = current_stream(x);
  p.row_tiles = as_int(choice.row_tiles);
  p.column_tiles = as_int(choice.column_tiles);
  const int64_t tiles = choice.row_tiles * choice.column_tiles * p.groups;
  if (tiles == 0) return;
  RESNET_FUSED_CHECK(tiles <= INT32_MAX, "convolution: must have fewer tiles, got ", tiles);
  const int64_t phases_of_launch = std::min<int64_t>(phases.size(), kMaxPhases);
  const int64_t words_of_tile = Tile::kM * Tile::kN;
  const int64_t sums = choice.splits > 1 ? tiles * phases_of_launch : 0;
  // Behind the sums, which are aligned, the counters.
  Tensor workspace =
      allocate_vector(x, sums * (choice.splits * words_of_tile + 1), aoti_torch_dtype_float32());
  float* memory = static_cast<float*>(workspace.mutable_data_ptr());
  p.partial_sums = reinterpret_cast<float4*>(memory);
  p.finished = reinterpret_cast<unsigned*>(memory + sums * choice.splits * words_of_tile);
  for (size_t first = 0; first < phases.size(); first += kMaxPhases) {
    const size_t count = std::min<size_t>(phases.size() - first, kMaxPhases);
    std::copy_n(phases.begin() + first, count, p.phases);
    if (choice.splits > 1) zero_async(p.finished, sums * sizeof(unsigned), stream);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(choice.splits),
                    static_cast<unsigned>(count));
    launch(p, grid, stream);
  }
}

// Runs all phases of one kernel. Results of the epilogue for each tile are those of one phase after
// the other.
template <class Tile, class Prologue, class Epilogue, bool kTransposed>
void launch_conv(const Tensor& x, const ConvParameters& p, const std::vector<Phase>& phases,
                 const Choice& choice, const typename Prologue::Parameters& prologue,
                 typename Epilogue::Parameters epilogue) {
  constexpr size_t kShared = shared_bytes<Tile, Patches<Tile, Prologue, kTransposed>, Epilogue>();
  allow_shared_bytes(conv_kernel<Tile, Prologue, Epilogue, kTransposed>, kShared);
  launch_tiles<Tile>(
      x, p, phases, choice, [&](const ConvParameters& filled, dim3 grid, cudaStream_t stream) {
        RESNET_FUSED_LAUNCH((conv_kernel<Tile, Prologue, Epilogue, kTransposed>), grid,
                            Tile::kThreads, kShared, stream, filled, prologue, epilogue);
        Epilogue::skip(epilogue, int64_t{filled.row_tiles} * grid.z * p.columns * p.groups);
      });
}

// Whether tensors like a result with so many channels in a group move 16 bytes at a time.
template <class T>
bool has_vectors(int64_t columns, uintptr_t addresses) {
  return columns % kChunk<T> == 0 && addresses % kVectorBytes == 0;
}

}  // namespace resnet_fused
