// The last convolution of a residual block together with its projection shortcut: one product whose
// sum goes over the channels of both, so that the projection is never written or read.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "cuda/conv_launch.cuh"

namespace resnet_fused {
namespace {

// relu(sum + shift + projection_shift): the weights have taken the scales along.
struct ShiftsRelu {
  static constexpr int kSums = 0;
  struct Parameters {
    const float *shift, *projection_shift;  // (K,)
  };

  template <class Tile>
  static __device__ __forceinline__ void apply(typename Tile::Sum& sum,
                                               const ResultTile<Tile>& tile, const Parameters& p) {
#pragma unroll
    for (int j = 0; j < Tile::kFragmentsN; ++j) {
      const float2 own = tile.of_channels(p.shift, j);
      const float2 projection = tile.of_channels(p.projection_shift, j);
      const float2 shift{own.x + projection.x, own.y + projection.y};
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float value = sum[i][j][k] + (k % 2 == 0 ? shift.x : shift.y);
          sum[i][j][k] = value < 0 ? 0 : value;  // NaN is not less
        }
      }
    }
  }
};

// A tile of the result, or the share of it of a split. Grid: tiles, splits.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResidentBlocks)
    conv_projection_kernel(const __grid_constant__ ConvParameters p,
                           const __grid_constant__ ConvParameters projection,
                           const __grid_constant__ ShiftsRelu::Parameters epilogue) {
  const Phase& phase = p.phases[0];
  const Identity::Parameters prologue{};
  const Place place = place_of_block<Tile>(p, phase, p.steps_of_tap + projection.steps_of_tap);
  typename Tile::Sum sum{};
  {
    Place own = place;
    own.steps = std::min(place.first_step + place.steps, p.steps_of_tap) - place.first_step;
    Patches<Tile, Identity, false> patches(p, phase, prologue, own);
    main_loop<Tile>(sum, patches, own.steps);
  }
  {
    Place own = place;
    own.first_step = std::max(place.first_step - p.steps_of_tap, 0);
    own.steps = place.first_step + place.steps - p.steps_of_tap - own.first_step;
    Patches<Tile, Identity, false> patches(projection, projection.phases[0], prologue, own);
    main_loop<Tile>(sum, patches, own.steps);
  }
  if (gridDim.y > 1 && !add_splits<Tile>(sum, p)) return;
  const ResultTile<Tile> tile(p, phase, place);
  ShiftsRelu::apply<Tile>(sum, tile, epilogue);
  tile.write(sum, p.result);
}

Tensor conv_projection_relu_cuda(const Tensor& y, const Tensor& weight, const Tensor& scale,
                                 const Tensor& shift, const Tensor& x,
                                 const Tensor& projection_weight, const Tensor& projection_scale,
                                 const Tensor& projection_shift, std::vector<int64_t> stride,
                                 bool tf32, int64_t tile, int64_t splits) {
  const char* op = "conv_projection_relu";
  check_activation(op, "y", y);
  check_activation(op, "x", x);
  RESNET_FUSED_CHECK(x.scalar_type() == y.scalar_type(), op, ": x must have the dtype of y ",
                     torch::headeronly::toString(y.scalar_type()), ", got ",
                     torch::headeronly::toString(x.scalar_type()));
  RESNET_FUSED_CHECK(stride.size() == 2, op, ": stride must be two numbers, got ",
                     to_string(stride));
  const Convolution conv(op, y.size(0), {y.size(2), y.size(3)}, weight, {1, 1, 0, 0, 1, 1, 1});
  const Convolution projection(op, x.size(0), {x.size(2), x.size(3)}, projection_weight,
                               {stride[0], stride[1], 0, 0, 1, 1, 1});
  check_channels(op, conv, y);
  check_channels(op, projection, x);
  RESNET_FUSED_CHECK(conv.taps() == 1 && projection.taps() == 1, op,
                     ": weight and projection_weight must be 1x1, got ", to_string(weight.sizes()),
                     " and ", to_string(projection_weight.sizes()));
  const std::array<int64_t, 4> own = {conv.n, conv.k, conv.p, conv.q};
  const std::array<int64_t, 4> other = {projection.n, projection.k, projection.p, projection.q};
  RESNET_FUSED_CHECK(own == other, op, ": the projection must have the output's shape ",
                     to_string(own), ", got ", to_string(other));
  check_coefficients(op, "scale", scale, conv.k, y);
  check_coefficients(op, "shift", shift, conv.k, y);
  check_coefficients(op, "projection_scale", projection_scale, conv.k, y);
  check_coefficients(op, "projection_shift", projection_shift, conv.k, y);
  const DeviceGuard guard(y.get_device_index());
  Tensor out = allocate_result(y, conv.n, conv.k, conv.p, conv.q);
  if (out.numel() == 0) return out;
  dispatch_arithmetic(op, y, tf32, [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using Tiles = TilesOf<T, typename decltype(arithmetic)::type, Identity>;
    const ForwardProblem<T> own(op, y, weight, conv, Grouping(conv, kChunk<T>), scale);
    const ForwardProblem<T> other(op, x, projection_weight, projection,
                                  Grouping(projection, kChunk<T>), projection_scale);
    ConvParameters p = own.parameters, q = other.parameters;
    p.result = out.mutable_data_ptr();
    p.has_vectors = has_vectors<T>(p.columns, address(p.result));
    q.phases[0] = other.phases[0];
    const ShiftsRelu::Parameters epilogue{
        static_cast<const float*>(shift.const_data_ptr()),
        static_cast<const float*>(projection_shift.const_data_ptr())};
    const Choice choice =
        choose_tile<Tiles>(op, own.phases, 1, p.columns, p.steps_of_tap + q.steps_of_tap,
                           y.get_device_index(), wanted_choice(tile, splits));
    visit_tile<Tiles>(choice.tile, [&](auto tile) {
      using Tile = decltype(tile);
      constexpr size_t kShared = shared_bytes<Tile, Patches<Tile, Identity, false>, ShiftsRelu>();
      allow_shared_bytes(conv_projection_kernel<Tile>, kShared);
      launch_tiles<Tile>(y, p, own.phases, choice,
                         [&](const ConvParameters& filled, dim3 grid, cudaStream_t stream) {
                           RESNET_FUSED_LAUNCH((conv_projection_kernel<Tile>), grid, Tile::kThreads,
                                               kShared, stream, filled, q, epilogue);
                         });
    });
  });
  return out;
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("conv_projection_relu", TORCH_BOX(&resnet_fused::conv_projection_relu_cuda));
}
