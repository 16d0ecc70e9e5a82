"""Broken copies of the CUDA convolutions, each of which must be found.

One text holds all kernels, for one dtype and one tile, with all mistakes in it. Each of them can be
switched on alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulation
import pytest
import torch
from convolutions import Tensors
from emulated_convolutions import Kind, given, run, tiles_of
from test_conv_bn_relu import Conv

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable())),
]

DTYPE = torch.bfloat16
SOURCES = (
    *("conv_operands.cu", "conv_partials.cu", "conv_bn_relu.cu", "conv_projection_relu.cu"),
    *("conv_stats.cu", "conv_dgrad.cu", "conv_wgrad.cu"),
)
HEADERS = (
    *("conv.cuh", "conv_epilogue.cuh", "conv_kernel.cuh", "conv_launch.cuh", "conv_tiles.h"),
    "reduction.h",
)
BEFORE = """
#define dispatch_up_to_float32(op, name, dtype, ...) (__VA_ARGS__)(torch::headeronly::BFloat16{})
#define dispatch_floating(op, name, dtype, ...) (__VA_ARGS__)(torch::headeronly::BFloat16{})
"""
AFTER = """
resnet_fused::Tensor resnet_fused::scale_shift_relu(const char* op, const Tensor&, const Tensor&,
                                                    const Tensor&) {
  fail(op, ": has no prologue of its own here");
}
"""


class Case(NamedTuple):
    """A call that a mistake spoils."""

    kind: Kind
    conv: Conv
    splits: int = 1
    offset: int = 0  # elements by which all tensors begin behind a vector's start


# Rows and columns in two tiles of 64, the last steps of 32 channels in part.
POINTWISE = Conv((2, 72, 5, 7), 88, 1, padding=(0, 0))
CASES = {
    "forward": Case(Kind("conv_bn_relu", "residual"), POINTWISE),
    "forward, 64 columns": Case(Kind("conv_bn_relu", "residual"), POINTWISE._replace(kernels=64)),
    "forward in splits": Case(Kind("conv_bn_relu", "residual"), POINTWISE, 3),
    # The step behind the last one lies where the result goes through shared memory.
    "forward, 4 steps": Case(
        Kind("conv_bn_relu", "no residual"), POINTWISE._replace(x=(2, 128, 5, 7))
    ),
    "forward, far outside": Case(
        Kind("conv_bn_relu", "residual"), POINTWISE._replace(padding=(3, 3), dilation=(2, 2))
    ),
    "forward 3x3": Case(Kind("conv_bn_relu", "residual"), Conv((1, 32, 6, 7), 41)),
    "forward 3x3 in splits": Case(Kind("conv_bn_relu", "residual"), Conv((1, 72, 6, 7), 41), 3),
    "forward, large image": Case(Kind("conv_bn_relu", "residual"), Conv((1, 40, 20, 3), 8)),
    "stem": Case(
        Kind("conv_bn_relu", "residual"),
        Conv((1, 3, 15, 12), 41, 7, stride=(2, 2), padding=(3, 3)),
    ),
    "odd channels": Case(Kind("conv_bn_relu", "residual"), Conv((1, 27, 3, 7), 41)),
    "depthwise": Case(Kind("conv_bn_relu", "residual"), Conv((1, 24, 5, 4), 24, groups=24)),
    "forward between vectors": Case(Kind("conv_bn_relu", "residual"), POINTWISE, offset=1),
    "projection": Case(Kind("conv_projection_relu", "projection"), POINTWISE),
    "projection in splits": Case(Kind("conv_projection_relu", "projection"), POINTWISE, 3),
    "statistics": Case(Kind("conv_stats", "identity"), POINTWISE),
    "statistics of many tiles": Case(
        Kind("conv_stats", "identity"), Conv((1, 8, 130, 130), 40, 1, padding=(0, 0))
    ),
    "statistics behind a prologue": Case(Kind("conv_stats", "prologue"), POINTWISE),
    "dgrad": Case(Kind("conv_dgrad", "all"), POINTWISE),
    "dgrad in splits": Case(Kind("conv_dgrad", "all"), POINTWISE, 3),
    "dgrad without prologue": Case(Kind("conv_dgrad", "relu and sums"), POINTWISE),
    "dgrad with mask": Case(Kind("conv_dgrad", "all with mask"), POINTWISE),
    "dgrad strided": Case(
        Kind("conv_dgrad", "relu and sums"), Conv((3, 40, 9, 9), 24, stride=(2, 2))
    ),
    "dgrad in two launches": Case(
        Kind("conv_dgrad", "relu and sums"), Conv((2, 40, 8, 7), 40, stride=(3, 2)), 2
    ),
    "dgrad between vectors": Case(Kind("conv_dgrad", "batch norm"), POINTWISE, offset=1),
    "wgrad": Case(Kind("conv_wgrad", "identity"), POINTWISE),
    "wgrad in splits": Case(Kind("conv_wgrad", "identity"), POINTWISE, 3),
    "wgrad 3x3": Case(Kind("conv_wgrad", "prologue"), Conv((1, 40, 7, 9), 72)),
    "wgrad, odd channels": Case(Kind("conv_wgrad", "identity"), Conv((1, 27, 3, 7), 41)),
    "wgrad depthwise": Case(Kind("conv_wgrad", "identity"), Conv((1, 24, 5, 4), 24, groups=24)),
}


class Mutant(NamedTuple):
    """A mistake: what stands between the two @ of `site` becomes `new`."""

    site: str
    new: str
    case: str
    found: str  # "results", "traffic", "bank conflicts" or part of an emulator's error


RACE = "races through shared memory"
GLOBAL_RACE = "races through global memory"
IN_FLIGHT = "while a cp.async started"
UNTIMELY = f"{RACE}|{IN_FLIGHT}|uninitialised"  # whichever thread comes first

MUTANTS: dict[str, dict[str, Mutant]] = {
    "conv.cuh": {
        "chunks of rows not permuted": Mutant(
            "return row * kStepBytes + (@(chunk ^ (row >> 1 & 3))@ * kChunkBytes);",
            "chunk",
            "forward",
            "bank conflicts",
        ),
        "chunks of columns not permuted": Mutant(
            "return summed * kPitch + @(chunk ^ permutation)@ * kChunkBytes;",
            "chunk",
            "dgrad",
            "bank conflicts",
        ),
        "first copies are no groups": Mutant(
            "source.copy(stage * kStageBytes, stage < steps);\n    @ptx::commit_copies();@",
            "",
            "forward",
            IN_FLIGHT,
        ),
        "first step not waited for": Mutant(
            "@ptx::wait_for_copies<Tile::kStages - 2>();@\n  source.transform(0, true);",
            "ptx::wait_for_copies<Tile::kStages - 1>();",
            "forward",
            IN_FLIGHT,
        ),
        "no barrier in front of the first step": Mutant(
            "source.transform(0, true);\n  @__syncthreads();@", "", "forward", UNTIMELY
        ),
        "next step not waited for": Mutant(
            "if constexpr (!Source::kTransforms) @ptx::wait_for_copies<Tile::kStages - 2>();@",
            "ptx::wait_for_copies<Tile::kStages - 1>();",
            "forward",
            IN_FLIGHT,
        ),
        "no barrier between steps": Mutant(
            "@__syncthreads();@\n        read = next;", "", "forward", UNTIMELY
        ),
        "prologue does not wait": Mutant(
            "@ptx::wait_for_copies<Tile::kStages - 3>();@",
            "ptx::wait_for_copies<Tile::kStages - 2>();",
            "statistics behind a prologue",
            IN_FLIGHT,
        ),
        "later copies are no groups": Mutant(
            "source.copy(write, steps >= Tile::kStages);\n        @ptx::commit_copies();@",
            "",
            "forward",
            IN_FLIGHT,
        ),
        "last copies not waited for": Mutant(
            "@ptx::wait_for_copies<0>();@\n  __syncthreads();\n}", "", "forward", IN_FLIGHT
        ),
        "no barrier behind the last step": Mutant(
            "ptx::wait_for_copies<0>();\n  @__syncthreads();@\n}", "", "forward, 4 steps", RACE
        ),
        "taps before the image": Mutant(
            "const int begin = @first < 0 ? axis.dilation.divide(d - 1 - first) : 0@;",
            "0",
            "forward 3x3",
            "results",
        ),
        "first tap of an image from its inside": Mutant(
            "const int begin = @first < 0 ? axis.dilation.divide(d - 1 - first) : 0@;",
            "axis.dilation.divide(d - 1 - first)",
            "forward 3x3",
            "results",
        ),
        "taps behind the image": Mutant(
            "const int end = @behind < axis.taps ? behind : axis.taps@;",
            "axis.taps",
            "forward 3x3",
            "results",
        ),
        "more taps than there are": Mutant(
            "const int end = @behind < axis.taps ? behind : axis.taps@;",
            "behind",
            "forward, large image",
            "results",
        ),
        "a first tap behind the image": Mutant(
            "const int behind = @first < axis.source ? axis.dilation.divide(axis.source - "
            "first + d - 1) : 0@;",
            "axis.dilation.divide(axis.source - first + d - 1)",
            "forward, far outside",
            "results",
        ),
        "no tap in the image": Mutant(
            "return @end > begin ? (1u << end) - (1u << begin) : 0@;",
            "(1u << end) - (1u << begin)",
            "forward, far outside",
            "traffic",
        ),
        "rows behind the last pixel": Mutant(
            "missing_[i] = @row < phase.pixels ? ~exists : ~0u@;", "~exists", "forward", "traffic"
        ),
        "columns behind the last": Mutant(
            "const int existing = @column < p.columns ? column : p.columns - 1@;",
            "column",
            "forward",
            "traffic",
        ),
        "columns behind the last, transposed": Mutant(
            "if (@column >= p.columns@) summed_ = kNoChannel;", "false", "dgrad", "traffic"
        ),
        "copies behind the last step": Mutant(
            "const bool is_rest = @!is_step || ahead_.channel + chunk_ >= p_.channels@;",
            "ahead_.channel + chunk_ >= p_.channels",
            "forward in splits",
            "traffic",
        ),
        "channels behind the last": Mutant(
            "const bool is_rest = @!is_step || ahead_.channel + chunk_ >= p_.channels@;",
            "!is_step",
            "forward",
            "results",
        ),
        "channels of the source behind the last": Mutant(
            "const uint32_t taps = ahead_.taps | @(is_rest ? kNothing : 0)@;",
            "0",
            "forward",
            "results",
        ),
        "channels of the weight behind the last": Mutant(
            "ptx::offset<sizeof(T)>(weight, offset_b_[i]), @!is_rest@);",
            "true",
            "forward",
            "results",
        ),
        "source not there": Mutant(
            "const bool exists = @(missing_[i] & taps) == 0@;\n      const SharedAddress to",
            "true",
            "forward 3x3",
            "results",
        ),
        "output of the batch norm not there": Mutant(
            "const bool exists = @(missing_[i] & taps) == 0@;\n        const SharedAddress to",
            "true",
            "dgrad",
            "traffic",
        ),
        "transposed weight behind the last step": Mutant(
            "const bool exists = @is_step@ && ahead_.channel", "true", "dgrad in splits", "traffic"
        ),
        "transposed channels behind the last": Mutant(
            "is_step && @ahead_.channel + summed_ + summed < p_.channels@;",
            "true",
            "dgrad without prologue",
            "results",
        ),
        "prologue of channels behind the last": Mutant(
            "if (@is_step && behind_.channel + chunk_ < p_.channels@) {",
            "is_step",
            "statistics behind a prologue",
            "results",
        ),
        "prologue behind the last step": Mutant(
            "if (@is_step && behind_.channel + chunk_ < p_.channels@) {",
            "behind_.channel + chunk_ < p_.channels",
            "dgrad in splits",
            GLOBAL_RACE,
        ),
        "all columns write the gradient": Mutant(
            "if (@writes_@ && (missing_", "true", "dgrad", GLOBAL_RACE
        ),
        "gradients of rows behind the last pixel": Mutant(
            "writes_ && @(missing_[i] & behind_.taps) == 0@)", "true", "dgrad", "traffic"
        ),
        "every split begins with the first tap": Mutant(
            "const int first = @place.first_step / p.steps_of_tap@;",
            "0",
            "forward 3x3 in splits",
            "results",
        ),
        "every split begins with a tap": Mutant(
            "channel = @(place.first_step - first * p.steps_of_tap) * Tile::kSummed@;",
            "0",
            "forward in splits",
            "results",
        ),
        "a step more for each tap": Mutant(
            "if (@channel < p.channels@) return;", "channel <= p.channels", "forward 3x3", "results"
        ),
    },
    "conv_epilogue.cuh": {
        "no barrier in front of a tensor": Mutant(
            "@__syncthreads();@\n#pragma unroll\n    for (int i = 0; i < kCopies; ++i) {\n"
            "      const int row = copied_row(i);\n      const T* from",
            "",
            "dgrad",
            RACE,
        ),
        "all of a tile's tensor": Mutant(
            "ptx::copy_async(staged(row, copied_chunk()), from, @copies(row)@);",
            "true",
            "forward",
            "traffic",
        ),
        "elements behind the last column": Mutant(
            "if (@has_row(row) && has_column(copied_column() + k)@) elements",
            "has_row(row)",
            "odd channels",
            "traffic",
        ),
        "elements behind the last row": Mutant(
            "if (@has_row(row) && has_column(copied_column() + k)@) elements",
            "has_column(copied_column() + k)",
            "odd channels",
            "traffic",
        ),
        "copies of a tensor are no group": Mutant(
            "@ptx::commit_copies();@\n    ptx::wait_for_copies<0>();", "", "forward", IN_FLIGHT
        ),
        "copies of a tensor not waited for": Mutant(
            "@ptx::wait_for_copies<0>();@\n    __syncthreads();\n  }", "", "forward", IN_FLIGHT
        ),
        "no barrier behind a tensor": Mutant(
            "ptx::wait_for_copies<0>();\n    @__syncthreads();@\n  }", "", "forward", UNTIMELY
        ),
        "no barrier in front of the result": Mutant(
            "@__syncthreads();@\n#pragma unroll\n    for (int i = 0; i < kCopies; ++i) {\n"
            "      const int row = copied_row(i);\n      if (!copies(row)) continue;",
            "",
            "forward",
            UNTIMELY,
        ),
        "elements of the result behind the last column": Mutant(
            "if (@has_column(copied_column() + k)@) store(to + k",
            "true",
            "odd channels",
            GLOBAL_RACE,
        ),
        "results behind the last column": Mutant(
            "return @has_row(row) && has_column(copied_column())@;",
            "has_row(row)",
            "forward",
            GLOBAL_RACE,
        ),
        "results behind the last row": Mutant(
            "return @has_row(row) && has_column(copied_column())@;",
            "has_column(copied_column())",
            "forward, 64 columns",
            "traffic",
        ),
        "one row too many": Mutant(
            "return @place_.first_row + row < phase_.pixels@;",
            "place_.first_row + row <= phase_.pixels",
            "forward",
            "traffic",
        ),
        "one column too many": Mutant(
            "return @place_.first_column + column < p_.columns@;",
            "place_.first_column + column <= p_.columns",
            "odd channels",
            GLOBAL_RACE,
        ),
        "vectors behind the last channel": Mutant(
            "return {@has_column(first)@ ?", "true", "forward", "traffic"
        ),
        "second of a pair behind the last channel": Mutant(
            "@has_column(first + 1)@ ?", "true", "odd channels", "traffic"
        ),
        "pixels of a phase side by side": Mutant(
            "if (@phase_.is_dense@) return pixel;", "true", "dgrad strided", GLOBAL_RACE
        ),
        "mean of rows that are not there": Mutant(
            "if (@tile.has_row(tile.row(i, half))@) values[k] += sum",
            "true",
            "statistics behind a prologue",
            "results",
        ),
        "deviations of rows that are not there": Mutant(
            "if (@tile.has_row(tile.row(i, half))@) values[k] = fmaf(",
            "true",
            "statistics",
            "results",
        ),
        "mean of whole tiles": Mutant(
            "const float inverse = 1.0f / static_cast<float>(@tile.rows()@);",
            "Tile::kM",
            "statistics",
            "results",
        ),
        "no barrier in front of the mean": Mutant(
            "Sums::put(values, 0);\n    @__syncthreads();@", "", "statistics", UNTIMELY
        ),
        "no barrier in front of the deviations": Mutant(
            "Sums::put(values, 1);\n    @__syncthreads();@", "", "statistics", UNTIMELY
        ),
        "statistics of columns behind the tile": Mutant(
            "if (@column < Tile::kN && tile.has_column(column)@) {\n"
            "      const int64_t at = static_cast<int64_t>(partial) * tile.channels() + "
            "tile.channel(column);\n      store(p.means",
            "tile.has_column(column)",
            "statistics",
            GLOBAL_RACE,
        ),
        "statistics of columns behind the last": Mutant(
            "if (@column < Tile::kN && tile.has_column(column)@) {\n"
            "      const int64_t at = static_cast<int64_t>(partial) * tile.channels() + "
            "tile.channel(column);\n      store(p.means",
            "column < Tile::kN",
            "statistics",
            GLOBAL_RACE,
        ),
        "mask of rows that are not there": Mutant(
            "if (@!tile.has_row(row)@) continue;", "false", "dgrad with mask", "traffic"
        ),
        "mask of columns that are not there": Mutant(
            "if (@!tile.has_column(tile.column(j))@) continue;",
            "false",
            "dgrad with mask",
            "traffic",
        ),
        "mask of the second column": Mutant(
            "if ((bits & @2@) == 0)", "1", "dgrad with mask", "results"
        ),
        "sums of rows that are not there": Mutant(
            "if (@!tile.has_row(tile.row(i, half))@) continue;", "false", "dgrad", "results"
        ),
        "no barrier in front of the sums": Mutant(
            "Sums::put(sums_of_x, 1);\n    @__syncthreads();@", "", "dgrad", UNTIMELY
        ),
        "sums of columns behind the tile": Mutant(
            "if (@column < Tile::kN && tile.has_column(column)@) {\n"
            "      const int64_t at = static_cast<int64_t>(partial) * tile.channels() + "
            "tile.channel(column);\n      store(p.sums",
            "tile.has_column(column)",
            "dgrad",
            GLOBAL_RACE,
        ),
        "sums of columns behind the last": Mutant(
            "if (@column < Tile::kN && tile.has_column(column)@) {\n"
            "      const int64_t at = static_cast<int64_t>(partial) * tile.channels() + "
            "tile.channel(column);\n      store(p.sums",
            "column < Tile::kN",
            "dgrad",
            GLOBAL_RACE,
        ),
    },
    "conv_kernel.cuh": {
        "tiles without a pixel": Mutant(
            "const int64_t steps = @place.first_row < phase.pixels ? all_steps : 0@;",
            "all_steps",
            "dgrad strided",
            "traffic",
        ),
        "every split begins at once": Mutant(
            "place.first_step = static_cast<int>(@steps * blockIdx.y / gridDim.y@);",
            "0",
            "forward in splits",
            "results",
        ),
        "the last split twice": Mutant("@sum[i][j][k] = 0;@", "", "forward in splits", "results"),
        "not the last split": Mutant(
            "split < @gridDim.y@; ++split) {\n#pragma unroll\n    for (int i = 0; i < Tile",
            "gridDim.y - 1",
            "forward in splits",
            "results",
        ),
        "sums of all phases in one place": Mutant(
            "const int partial = @blockIdx.z * p.row_tiles + place.first_row / Tile::kM@;",
            "place.first_row / Tile::kM",
            "dgrad strided",
            GLOBAL_RACE,
        ),
    },
    "reduction.h": {
        "no fence in front of the counter": Mutant(
            "@__threadfence();@\n  __syncthreads();\n  if (threadIdx.x == 0",
            "",
            "forward in splits",
            GLOBAL_RACE,
        ),
        "no barrier in front of the counter": Mutant(
            "__threadfence();\n  @__syncthreads();@\n  if (threadIdx.x == 0",
            "",
            "forward in splits",
            GLOBAL_RACE,
        ),
        "no barrier behind the counter": Mutant(
            "@__syncthreads();@\n  const bool last", "", "forward in splits", UNTIMELY
        ),
        "the last but one is the last": Mutant(
            "atomicAdd(finished, 1u) == @gridDim.y - 1@",
            "gridDim.y - 2",
            "forward in splits",
            "results",
        ),
        "no barrier in front of the other rows": Mutant(
            "@__syncthreads();@\n    if (row < half) {", "", "statistics of many tiles", UNTIMELY
        ),
        "no barrier behind the other rows": Mutant(
            "combine(values, others);\n    }\n    @__syncthreads();@",
            "",
            "statistics of many tiles",
            RACE,
        ),
    },
    "conv_launch.cuh": {
        "counters not zero": Mutant(
            "if (choice.splits > 1) @zero_async(p.finished, sums * sizeof(unsigned), stream);@",
            "",
            "forward in splits",
            "results",
        ),
        "counters not zero again": Mutant(
            "if (choice.splits > 1) @zero_async(p.finished, sums * sizeof(unsigned), stream);@",
            "if (first == 0) zero_async(p.finished, sums * sizeof(unsigned), stream);",
            "dgrad in two launches",
            "results",
        ),
        "sums of all launches in one place": Mutant(
            "@Epilogue::skip(epilogue, int64_t{filled.row_tiles} * grid.z * p.columns * "
            "p.groups);@",
            "",
            "dgrad in two launches",
            "results",
        ),
        "result's vectors at any address": Mutant(
            "&& @addresses % kVectorBytes == 0@;", "true", "forward between vectors", "misaligned"
        ),
        "result's vectors at any channel": Mutant(
            "return @columns % kChunk<T> == 0@ &&", "true", "odd channels", "misaligned"
        ),
    },
    "conv_dgrad.cu": {
        "prologue's tensors at any address": Mutant(
            "fuses = fuses_batch_norm(conv, grouping) &&\n"
            "              @(address(grad_y.const_data_ptr()) | address(y->const_data_ptr()) |\n"
            "               address(coefficients->const_data_ptr())) %\n"
            "                      kVectorBytes ==\n"
            "                  0@;",
            "true",
            "dgrad between vectors",
            "misaligned",
        ),
    },
    "conv_wgrad.cu": {
        "kernels behind the last": Mutant(
            "const bool exists = @exists_a_ && next_a_ + i * A::kSummedApart < end_@;",
            "next_a_ + i * A::kSummedApart < end_",
            "wgrad",
            "traffic",
        ),
        "gradients behind the last pixel": Mutant(
            "const bool exists = @exists_a_ && next_a_ + i * A::kSummedApart < end_@;",
            "exists_a_",
            "wgrad",
            "results",
        ),
        "columns behind the last": Mutant(
            "bool exists = @exists_b_ && next_b_ + i * B::kSummedApart < end_@;",
            "next_b_ + i * B::kSummedApart < end_",
            "wgrad",
            "traffic",
        ),
        "pixels behind the last": Mutant(
            "bool exists = @exists_b_ && next_b_ + i * B::kSummedApart < end_@;",
            "exists_b_",
            "wgrad",
            "results",
        ),
        "taps above the image": Mutant(
            "exists = exists && @y >= 0@ && y < p_.height && x_ >= 0 && x_ < p_.width;",
            "true",
            "wgrad 3x3",
            "results",
        ),
        "taps below the image": Mutant(
            "exists = exists && y >= 0 && @y < p_.height@ && x_ >= 0 && x_ < p_.width;",
            "true",
            "wgrad 3x3",
            "results",
        ),
        "taps left of the image": Mutant(
            "exists = exists && y >= 0 && y < p_.height && @x_ >= 0@ && x_ < p_.width;",
            "true",
            "wgrad 3x3",
            "results",
        ),
        "taps right of the image": Mutant(
            "exists = exists && y >= 0 && y < p_.height && x_ >= 0 && @x_ < p_.width@;",
            "true",
            "wgrad 3x3",
            "results",
        ),
        "prologue of the padding": Mutant(
            "if (@(exists_ >> waiting_ & 1) == 0@) continue;", "false", "wgrad 3x3", "results"
        ),
        "shares behind the last kernel": Mutant(
            "if (@kernel >= p.kernels@) continue;", "false", "wgrad in splits", GLOBAL_RACE
        ),
        "shares behind the last column": Mutant(
            "if (@column + 8 * j >= p.columns@) continue;", "false", "wgrad", GLOBAL_RACE
        ),
        "all pixels to the end": Mutant(
            "const int end_pixel =\n"
            "      @end_step * int64_t{Tile::kSummed} < p.pixels ? end_step * Tile::kSummed : "
            "p.pixels@;",
            "p.pixels",
            "wgrad in splits",
            "traffic",
        ),
        "whole steps to the end": Mutant(
            "const int end_pixel =\n"
            "      @end_step * int64_t{Tile::kSummed} < p.pixels ? end_step * Tile::kSummed : "
            "p.pixels@;",
            "end_step * Tile::kSummed",
            "wgrad",
            "results",
        ),
        "a share more": Mutant(
            "share < @z.shares@ && first", "z.shares + 1", "wgrad in splits", "results"
        ),
        "elements behind a share": Mutant(
            "share < z.shares && @first < z.elements@;", "true", "wgrad", "traffic"
        ),
        "all rows of threads write": Mutant(
            "if (@threadIdx.y != 0@ || first", "false", "wgrad in splits", GLOBAL_RACE
        ),
        "elements of no kernel": Mutant(
            "|| @first >= z.elements@) return;", "false", "wgrad", "traffic"
        ),
        "channels behind those of a group": Mutant(
            "if (@c < 0 || c >= z.channels@) continue;", "c < 0", "wgrad, odd channels", GLOBAL_RACE
        ),
        "channels before those of a group": Mutant(
            "if (@c < 0 || c >= z.channels@) continue;",
            "c >= z.channels",
            "wgrad depthwise",
            GLOBAL_RACE,
        ),
    },
    "conv_partials.cu": {
        "channels behind the last": Mutant(
            "tile < p.tiles && @exists@;", "true", "statistics of many tiles", "traffic"
        ),
        "partial results of channels behind the last": Mutant(
            "if (threadIdx.y == 0 && @exists@) {", "true", "statistics of many tiles", GLOBAL_RACE
        ),
        "results of channels behind the last": Mutant(
            "if (threadIdx.y == 0 && @exists@) total.write",
            "true",
            "statistics of many tiles",
            "traffic",
        ),
        "results of all rows of threads": Mutant(
            "if (@threadIdx.y == 0@ && exists) total.write",
            "true",
            "statistics of many tiles",
            GLOBAL_RACE,
        ),
        "a last tile as large as all others": Mutant(
            "count() = static_cast<float>(@left < p.tile_pixels ? left : p.tile_pixels@);",
            "p.tile_pixels",
            "statistics of many tiles",
            "results",
        ),
        "the last block twice": Mutant(
            "@total = Kind();@", "", "statistics of many tiles", "results"
        ),
        "not the last block": Mutant(
            "split < @gridDim.y@ && exists", "gridDim.y - 1", "statistics of many tiles", "results"
        ),
        "blocks' results of channels behind the last": Mutant(
            "split < gridDim.y && @exists@;", "true", "statistics of many tiles", "traffic"
        ),
        "counters not zero": Mutant(
            "if (splits > 1) @zero_async(memory, columns * sizeof(unsigned), stream);@",
            "",
            "statistics of many tiles",
            "results",
        ),
    },
    "conv_operands.cu": {
        "copies from any address": Mutant(
            "const bool is_aligned = @address(t.const_data_ptr()) % kVectorBytes == 0@;",
            "true",
            "forward between vectors",
            "misaligned",
        ),
        "weight at any address": Mutant(
            "@address(weight.const_data_ptr()) % kVectorBytes == 0@ && !scale",
            "true",
            "forward between vectors",
            "misaligned",
        ),
        "pixels left of the image": Mutant(
            "const bool exists = @run_of_x >= 0@ &&", "true", "stem", "results"
        ),
        "pixels right of the image": Mutant(
            "run_of_x >= 0 && @run_of_x < z.width * z.groups@;", "true", "stem", "results"
        ),
        "channels of the next pixel": Mutant(
            "if (exists && @first + k < z.channels@)", "true", "odd channels", "results"
        ),
        "channels of other groups": Mutant(
            "if (@c >= 0 && c < z.channels@) {", "c < z.channels", "depthwise", "results"
        ),
        "channels of the next group": Mutant(
            "if (@c >= 0 && c < z.channels@) {", "c >= 0", "depthwise", "results"
        ),
    },
    "conv_projection_relu.cu": {
        "first product beyond its channels": Mutant(
            "own.steps = @std::min(place.first_step + place.steps, p.steps_of_tap)@ - place",
            "place.first_step + place.steps",
            "projection",
            "results",
        ),
        "every split begins with the first step of the second product": Mutant(
            "own.first_step = @std::max(place.first_step - p.steps_of_tap, 0)@;",
            "0",
            "projection in splits",
            "results",
        ),
    },
}
ALL = [(file, name) for file, mutants in MUTANTS.items() for name in mutants]


def joined() -> str:
    """All sources, with the headers that hold kernels in place of their #include lines."""
    seen: set[str] = set()
    pasted = re.compile(rf'#include "cuda/({"|".join(map(re.escape, HEADERS))})"')

    def paste(match: re.Match[str]) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        return pasted.sub(paste, with_mistakes(match[1]).replace("#pragma once", ""))

    text = emulation.MISTAKE + emulation.AMID_NAN + BEFORE
    for source in SOURCES:
        stem = source.removesuffix(".cu")
        inlined = with_mistakes(source).replace("namespace {", f"inline namespace {stem}_cu {{")
        text += pasted.sub(paste, inlined)
    all_tiles = "typename TileList<T, Math, Prologue>::Types;"
    text = emulation.mutate(text, all_tiles, "std::tuple<Tile<T, Math, 64, 64, 32, 32, 4, 3>>;")
    return text + AFTER + emulation.MAKE_MISTAKE


def with_mistakes(file: str) -> str:
    """A file of csrc/cuda in which `mistake` chooses between what is right and each mutant."""
    text = (emulation.CSRC / "cuda" / file).read_text()
    return emulation.with_mistakes(
        text,
        (
            (1 + ALL.index((file, name)), mutant.site, mutant.new)
            for name, mutant in MUTANTS.get(file, {}).items()
        ),
    )


@pytest.fixture(scope="module")
def broken() -> Any:
    return emulation.compile_sources({"convolutions": joined()}, "csrc/cuda/mutants.cu")[
        "convolutions"
    ]


@pytest.fixture
def ops(broken: Any) -> Iterator[Any]:
    broken.configure(0, 3)
    yield broken
    broken.make_mistake(0)


def tensors_of(case: Case) -> Tensors:
    tensors = given(case.kind, case.conv, DTYPE)
    return {name: emulation.amid_nan(t, case.offset) for name, t in tensors.items()}


class Outcome(NamedTuple):
    results: Tensors
    records: list[dict[str, Any]]


def outcome(ops: Any, case: Case, tile: int = 0) -> Outcome:
    emulation.launches(ops)
    results = run(ops, case.kind, case.conv, tensors_of(case), False, tile, case.splits)
    records = emulation.launches(ops)
    for record in records:
        del record["barriers"]  # whether one is missed must show elsewhere
    return Outcome(results, records)


def are_equal(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", CASES)
def test_without_a_mistake_all_is_right(ops: Any, name: str) -> None:
    case = CASES[name]
    library = emulation.library()
    library.configure(0, 3)
    smallest = len(tiles_of(case.kind, case.conv, DTYPE)) - 1
    expected, actual = outcome(library, case, smallest), outcome(ops, case)
    assert are_equal(expected.results, actual.results)
    assert not any(t.isnan().any() for t in actual.results.values())


@pytest.fixture(scope="module")
def right(broken: Any) -> Callable[[str], Outcome]:
    """What a case gives without a mistake."""
    known: dict[str, Outcome] = {}

    def find(name: str) -> Outcome:
        if name not in known:
            broken.make_mistake(0)
            broken.configure(0, 3)
            known[name] = outcome(broken, CASES[name])
        return known[name]

    return find


@pytest.mark.parametrize(("file", "name"), ALL, ids=str)
def test_mistakes_are_found(
    ops: Any, right: Callable[[str], Outcome], file: str, name: str
) -> None:
    mutant = MUTANTS[file][name]
    expected = right(mutant.case)
    ops.make_mistake(1 + ALL.index((file, name)))
    assert re.search(mutant.found, how_found(ops, CASES[mutant.case], expected))


def how_found(ops: Any, case: Case, expected: Outcome) -> str:
    try:
        results, records = outcome(ops, case)
    except RuntimeError as error:
        return str(error)
    if not are_equal(expected.results, results):
        return "results"
    if any(record["bank_conflicts"] > 0 for record in records):
        return "bank conflicts"
    return "nothing" if records == expected.records else "traffic"
