// A convolution that measures its output, with batch norm and ReLU in front of it.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "cuda/conv_launch.cuh"
#include "cuda/conv_partials.h"

namespace resnet_fused {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

Result conv_stats_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                       const OptionalTensor& shift, std::vector<int64_t> geometry, bool tf32,
                       int64_t tile, int64_t splits) {
  const char* op = "conv_stats";
  check_activation(op, "x", x);
  const Convolution conv(op, x.size(0), {x.size(2), x.size(3)}, weight, geometry);
  check_channels(op, conv, x);
  check_prologue(op, conv, scale, shift, x);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = allocate_result(x, conv.n, conv.k, conv.p, conv.q);
  RESNET_FUSED_CHECK(y.numel() > 0, op, ": y must not be empty, got shape ", to_string(y.sizes()));
  Tensor mean, m2;
  dispatch_arithmetic(op, x, tf32, [&](auto element, auto arithmetic) {
    using T = decltype(element);
    using Math = typename decltype(arithmetic)::type;
    const Grouping grouping(conv, kChunk<T>);
    // A kernel of several taps would compute the prologue once for each.
    const bool fuses = scale && conv.is_pointwise() && grouping.groups == 1 &&
                       has_vector_coefficients(grouping, *scale, *shift);
    const Tensor source = scale && !fuses ? scale_shift_relu(op, x, *scale, *shift) : x;
    const ForwardProblem<T> problem(op, source, weight, conv, grouping, {});
    const std::vector<Phase>& phases = problem.phases;
    ConvParameters p = problem.parameters;
    p.result = y.mutable_data_ptr();
    p.has_vectors = has_vectors<T>(p.columns, address(p.result));
    const auto run = [&](auto policy, const typename decltype(policy)::Parameters& prologue) {
      using Prologue = decltype(policy);
      using Tiles = TilesOf<T, Math, Prologue>;
      const Choice choice = choose_tile<Tiles>(op, phases, p.groups, p.columns, steps_of(p, phases),
                                               x.get_device_index(), wanted_choice(tile, splits));
      const Tensor means = allocate_partials(x, choice.row_tiles, conv.k);
      const Tensor m2s = allocate_partials(x, choice.row_tiles, conv.k);
      const ChannelStats::Parameters epilogue{static_cast<float*>(means.mutable_data_ptr()),
                                              static_cast<float*>(m2s.mutable_data_ptr())};
      visit_tile<Tiles>(choice.tile, [&](auto tile) {
        using Tile = decltype(tile);
        launch_conv<Tile, Prologue, ChannelStats, false>(x, p, phases, choice, prologue, epilogue);
        std::tie(mean, m2) = combine_statistics(means, m2s, conv.n * conv.p * conv.q, Tile::kM);
      });
    };
    if (fuses) {
      run(ScaleShiftRelu{}, {static_cast<const float*>(scale->const_data_ptr()),
                             static_cast<const float*>(shift->const_data_ptr())});
    } else {
      run(Identity{}, {});
    }
  });
  return {y, mean, m2};
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(RESNET_FUSED_NAMESPACE, RESNET_FUSED_DISPATCH_KEY, m) {
  m.impl("conv_stats", TORCH_BOX(&resnet_fused::conv_stats_cuda));
}
