// Convolution as an implicit matrix product on tensor cores: y = epilogue(prologue(x) * weight),
// with what stands before and behind the product as policies. Here: the product and what comes
// before it; conv_epilogue.cuh and conv_kernel.cuh have the rest.
//
// A block computes a tile of the result; the patches of x that its rows stand for are gathered by
// 16-byte asynchronous copies, several steps ahead, zeros where a tap lies outside of the image.
// Both operands lie in shared memory in rows whose 16-byte chunks are permuted such that neither
// copies nor ldmatrix meet bank conflicts. CUTLASS documentation, "Implicit GEMM Convolution".
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/conv_problem.h"
#include "cuda/ptx.cuh"

namespace resnet_fused {

using ptx::SharedAddress;

constexpr int kChunkBytes = 16;
constexpr int kStepBytes = 64;         // of each row of an operand in a step of the main loop
constexpr int kInstructionBytes = 32;  // of each row in one product of the tensor cores
constexpr int kWarp = 32;

template <class T>
constexpr int kChunk = kChunkBytes / sizeof(T);  // elements

// ---- Arithmetic of the tensor cores ----

// float32 as four products of TF32's 11 bits: of both high parts, of each with the other's rest,
// and of the rests, without which the shortest sums would be less exact than float32.
struct SplitTf32 {};

template <class Math>
struct Multiply {
  template <int kRows, int kColumns>
  static __device__ __forceinline__ void add(float (&sum)[kRows][kColumns][4],
                                             const uint32_t (&a)[kRows][4],
                                             const uint32_t (&b)[kColumns][2]) {
    ptx::multiply_add<Math>(sum, a, b);
  }
};

template <>
struct Multiply<ptx::Tf32> {
  template <int kRows, int kColumns>
  static __device__ __forceinline__ void add(float (&sum)[kRows][kColumns][4],
                                             const uint32_t (&a)[kRows][4],
                                             const uint32_t (&b)[kColumns][2]) {
    uint32_t rounded_a[kRows][4], rounded_b[kColumns][2];
    round(a, rounded_a);
    round(b, rounded_b);
    ptx::multiply_add<ptx::Tf32>(sum, rounded_a, rounded_b);
  }

 private:
  template <int kTiles, int kWords>
  static __device__ __forceinline__ void round(const uint32_t (&values)[kTiles][kWords],
                                               uint32_t (&rounded)[kTiles][kWords]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        rounded[i][j] = ptx::round_to_tf32(ptx::float_of(values[i][j]));
      }
    }
  }
};

template <>
struct Multiply<SplitTf32> {
  template <int kRows, int kColumns>
  static __device__ __forceinline__ void add(float (&sum)[kRows][kColumns][4],
                                             const uint32_t (&a)[kRows][4],
                                             const uint32_t (&b)[kColumns][2]) {
    uint32_t high_a[kRows][4], low_a[kRows][4], high_b[kColumns][2], low_b[kColumns][2];
    split(a, high_a, low_a);
    split(b, high_b, low_b);
    // The smallest first, and all of them before they meet the large sum: tensor cores cut off what
    // does not fit behind its last digit.
    float part[kRows][kColumns][4] = {};
    ptx::multiply_add<ptx::Tf32>(part, low_a, low_b);
    ptx::multiply_add<ptx::Tf32>(part, low_a, high_b);
    ptx::multiply_add<ptx::Tf32>(part, high_a, low_b);
    // Infinity and NaN meet the other's high part alone: its rest may be 0, or have another sign.
    put_back(a, high_a);
    put_back(b, high_b);
    ptx::multiply_add<ptx::Tf32>(part, high_a, high_b);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[i][j][k] += part[i][j][k];
      }
    }
  }

 private:
  static __device__ __forceinline__ bool is_finite(uint32_t bits) {
    constexpr uint32_t kInfinity = 0x7f800000u;
    return (bits & kInfinity) != kInfinity;
  }

  // Both are 0 where the value is not finite.
  template <int kTiles, int kWords>
  static __device__ __forceinline__ void split(const uint32_t (&values)[kTiles][kWords],
                                               uint32_t (&high)[kTiles][kWords],
                                               uint32_t (&low)[kTiles][kWords]) {
    constexpr uint32_t kHighBits = 0xffffe000u;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const uint32_t value = is_finite(values[i][j]) ? values[i][j] : 0;
        const uint32_t rounded = ptx::round_to_tf32(ptx::float_of(value));
        // Rounding must not make an infinity.
        high[i][j] = is_finite(rounded) ? rounded : value & kHighBits;
        low[i][j] = ptx::round_to_tf32(ptx::float_of(value) - ptx::float_of(high[i][j]));
      }
    }
  }

  template <int kTiles, int kWords>
  static __device__ __forceinline__ void put_back(const uint32_t (&values)[kTiles][kWords],
                                                  uint32_t (&high)[kTiles][kWords]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        if (!is_finite(values[i][j])) high[i][j] = values[i][j];
      }
    }
  }
};

// ---- Tiles ----

// An operand of kRows rows as it lies in memory with the channels that are summed side by side:
// rows of kStepBytes.
template <class T, int kRows_, int kThreads>
struct SummedSideBySide {
  static constexpr int kRows = kRows_;
  static constexpr int kBytes = kRows * kStepBytes;
  static constexpr int kChunks = kStepBytes / kChunkBytes;  // of a row
  // Threads copy a row's chunks side by side; each has the same chunk of kCopies rows.
  static constexpr int kRowsApart = kThreads / kChunks;
  static constexpr int kCopies = kRows / kRowsApart;
  static_assert(kRows % kRowsApart == 0 && kRowsApart % 8 == 0);

  // Any 8 neighbouring rows have the same chunk in 8 different groups of banks.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    return row * kStepBytes + ((chunk ^ (row >> 1 & 3)) * kChunkBytes);
  }
  static constexpr int kBytesApart = kRowsApart * kStepBytes;

  // A warp's fragments: where its lane finds the first one of the first product.
  static __device__ __forceinline__ uint32_t first_of_a(int row, int lane) {
    return at(row + lane % 16, lane / 16);
  }
  static __device__ __forceinline__ uint32_t first_of_b(int row, int lane) {
    return at(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  template <int kTiles>
  static __device__ __forceinline__ void load_a(uint32_t (&a)[kTiles][4], SharedAddress first,
                                                int product) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      ptx::load_matrices(a[i], (first ^ (product * kInstructionBytes)) + i * 16 * kStepBytes);
    }
  }

  template <int kTiles>
  static __device__ __forceinline__ void load_b(uint32_t (&b)[kTiles][2], SharedAddress first,
                                                int product) {
    static_assert(kTiles % 2 == 0);
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      uint32_t pair[4];
      ptx::load_matrices(pair, (first ^ (product * kInstructionBytes)) + i * 8 * kStepBytes);
      b[i][0] = pair[0];
      b[i][1] = pair[1];
      b[i + 1][0] = pair[2];
      b[i + 1][1] = pair[3];
    }
  }
};

// An operand whose rows lie side by side in memory, for each channel or pixel that is summed:
// ldmatrix transposes it; 32-bit elements are loaded one by one.
template <class T, int kRows_, int kThreads>
struct RowsSideBySide {
  static constexpr int kRows = kRows_;
  static constexpr int kSummed = kStepBytes / sizeof(T);
  static constexpr int kPitch = kRows * sizeof(T);
  static constexpr int kBytes = kSummed * kPitch;
  static constexpr int kChunks = kPitch / kChunkBytes;
  // A thread copies the same chunk for kCopies of what is summed.
  static constexpr int kSummedApart = kThreads / kChunks;
  static constexpr int kCopies = kSummed / kSummedApart;
  static constexpr bool kTransposes = sizeof(T) == 2;
  static_assert(kSummed % kSummedApart == 0 && kSummedApart % (kTransposes ? 8 : 4) == 0);

  static __device__ __forceinline__ uint32_t at(int summed, int chunk) {
    const int permutation = kTransposes ? summed & 7 : (summed & 3) << 1;
    return summed * kPitch + (chunk ^ permutation) * kChunkBytes;
  }
  static constexpr int kBytesApart = kSummedApart * kPitch;

  static __device__ __forceinline__ uint32_t first_of_a(int row, int lane) {
    if constexpr (kTransposes) return at(lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2);
    return first_element(row, lane);
  }
  static __device__ __forceinline__ uint32_t first_of_b(int row, int lane) {
    if constexpr (kTransposes) return at(lane % 16, row / 8 + lane / 16);
    return first_element(row, lane);
  }

  template <int kTiles>
  static __device__ __forceinline__ void load_a(uint32_t (&a)[kTiles][4], SharedAddress first,
                                                int product) {
    static_assert(kTiles * 16 * sizeof(T) <= ptx::kSharedAlignment);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const SharedAddress at = (first ^ (i * 16 * sizeof(T))) + product * kProductBytes;
      if constexpr (kTransposes) {
        ptx::load_matrices_transposed(a[i], at);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) a[i][j] = element(at, j % 2, j / 2);
      }
    }
  }

  template <int kTiles>
  static __device__ __forceinline__ void load_b(uint32_t (&b)[kTiles][2], SharedAddress first,
                                                int product) {
    static_assert(kTiles % 2 == 0 && kTiles * 8 * sizeof(T) <= ptx::kSharedAlignment);
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      const SharedAddress at = (first ^ (i * 8 * sizeof(T))) + product * kProductBytes;
      if constexpr (kTransposes) {
        uint32_t pair[4];
        ptx::load_matrices_transposed(pair, at);
        b[i][0] = pair[0];
        b[i][1] = pair[1];
        b[i + 1][0] = pair[2];
        b[i + 1][1] = pair[3];
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) b[i + j / 2][j % 2] = element(at, j / 2, j % 2);
      }
    }
  }

 private:
  static constexpr int kProductBytes = kInstructionBytes / sizeof(T) * kPitch;

  static __device__ __forceinline__ uint32_t first_element(int row, int lane) {
    const int own_row = row + lane / 4;
    return at(lane % 4, own_row / kChunk<T>) + own_row % kChunk<T> * sizeof(T);
  }

  // The lane's own, or the one 8 rows and 4 of what is summed further.
  static __device__ __forceinline__ uint32_t element(SharedAddress own, int rows, int summed) {
    return ptx::load_shared<uint32_t>((own ^ (rows * 8 * sizeof(T))) + summed * 4 * kPitch);
  }
};

// How a block is cut: kM x kN elements of the result, kWarpM x kWarpN of each warp. kStages steps
// of the main loop are in shared memory, all but one of them under way; registers and shared memory
// leave room for kResidentBlocks.
template <class T_, class Math_, int kM_, int kN_, int kWarpM_, int kWarpN_, int kStages_,
          int kResidentBlocks_>
struct Tile {
  using T = T_;
  using Math = Math_;
  static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kStages = kStages_, kResidentBlocks = kResidentBlocks_;
  static constexpr int kWarpsM = kM / kWarpM, kWarpsN = kN / kWarpN;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kSummed = kStepBytes / sizeof(T);  // in a step of the main loop
  static constexpr int kProducts = kStepBytes / kInstructionBytes;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  using Sum = float[kFragmentsM][kFragmentsN][4];
  static_assert(kStages >= 3);
};

// ---- Main loop ----

// sum += the product over `steps` steps. The source starts copies of one step after the other,
// zeros behind the last, and may transform what the thread itself has copied.
template <class Tile, class Source>
__device__ __forceinline__ void main_loop(typename Tile::Sum& sum, Source& source, int steps) {
  if (steps <= 0) return;
  using A = typename Source::A;
  using B = typename Source::B;
  constexpr uint32_t kStageBytes = Source::kStageBytes;
  constexpr uint32_t kLastStage = (Tile::kStages - 1) * kStageBytes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const SharedAddress shared = ptx::dynamic_shared();
  const SharedAddress first_a = shared + A::first_of_a(warp / Tile::kWarpsN * Tile::kWarpM, lane);
  const SharedAddress first_b =
      shared + Source::kOffsetOfB + B::first_of_b(warp % Tile::kWarpsN * Tile::kWarpN, lane);
  uint32_t a[2][Tile::kFragmentsM][4], b[2][Tile::kFragmentsN][2];
  const auto load_fragments = [&](int buffer, uint32_t stage, int product) {
    A::load_a(a[buffer], first_a + stage, product);
    B::load_b(b[buffer], first_b + stage, product);
  };

#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    source.copy(stage * kStageBytes, stage < steps);
    ptx::commit_copies();
  }
  ptx::wait_for_copies<Tile::kStages - 2>();
  source.transform(0, true);
  __syncthreads();
  load_fragments(0, 0, 0);

  uint32_t read = 0, write = kLastStage;
#pragma unroll 1
  for (; steps > 0; --steps) {
    const uint32_t next = read == kLastStage ? 0 : read + kStageBytes;
#pragma unroll
    for (int product = 0; product < Tile::kProducts; ++product) {
      if (product == Tile::kProducts - 1) {
        // The next step is there for all, and all have read the rest of this one.
        if constexpr (!Source::kTransforms) ptx::wait_for_copies<Tile::kStages - 2>();
        __syncthreads();
        read = next;
      }
      load_fragments((product + 1) % 2, read, (product + 1) % Tile::kProducts);
      Multiply<typename Tile::Math>::add(sum, a[product % 2], b[product % 2]);
      // Behind the product, whose fragments have left their registers.
      if (product == 0) {
        if constexpr (Source::kTransforms) {
          ptx::wait_for_copies<Tile::kStages - 3>();
          source.transform(next, steps > 1);
        }
        source.copy(write, steps >= Tile::kStages);
        ptx::commit_copies();
        write = write == kLastStage ? 0 : write + kStageBytes;
      }
    }
  }
  // What follows reuses the memory.
  ptx::wait_for_copies<0>();
  __syncthreads();
}

// ---- Prologues ----

// What happens to the source before the product: applied in shared memory, one step ahead, by the
// thread that has copied a chunk. So it happens once for each tile of columns.

// The values of one chunk.
template <class T>
struct Chunk {
  float values[kChunk<T>];

  static __device__ __forceinline__ Chunk of(const uint4& words) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        chunk.values[i] = ptx::float_of(word[i]);
      } else {
        const float2 pair = ptx::unpack<T>(word[i]);
        chunk.values[2 * i] = pair.x;
        chunk.values[2 * i + 1] = pair.y;
      }
    }
    return chunk;
  }

  template <bool kRelu = false>
  __device__ __forceinline__ uint4 pack() const {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        const bool is_cut = kRelu && values[i] < 0;  // NaN is not
        word[i] = is_cut ? 0 : ptx::bits_of(values[i]);
      } else if constexpr (kRelu) {
        word[i] = ptx::pack_relu<T>(values[2 * i], values[2 * i + 1]);
      } else {
        word[i] = ptx::pack<T>(values[2 * i], values[2 * i + 1]);
      }
    }
    return {word[0], word[1], word[2], word[3]};
  }
};

// Of as many channels as a chunk has.
template <class T>
__device__ __forceinline__ void load_coefficients(float (&values)[kChunk<T>], const float* from) {
#pragma unroll
  for (int i = 0; i < kChunk<T>; i += 4) {
    const float4 four = load(reinterpret_cast<const float4*>(from + i));
    values[i] = four.x;
    values[i + 1] = four.y;
    values[i + 2] = four.z;
    values[i + 3] = four.w;
  }
}

struct Identity {
  static constexpr int kTensors = 1;
  static constexpr bool kTransforms = false;
  struct Parameters {};

  template <class T>
  struct Coefficients {
    __device__ __forceinline__ Coefficients(const Parameters&, int) {}
  };
};

// relu(x * scale + shift).
struct ScaleShiftRelu {
  static constexpr int kTensors = 1;
  static constexpr bool kTransforms = true;
  struct Parameters {
    const float *scale, *shift;  // (C,), aligned to 16 bytes
  };

  template <class T>
  struct Coefficients {
    float scale[kChunk<T>], shift[kChunk<T>];

    __device__ __forceinline__ Coefficients(const Parameters& p, int channel) {
      load_coefficients<T>(scale, p.scale + channel);
      load_coefficients<T>(shift, p.shift + channel);
    }

    __device__ __forceinline__ uint4 apply(const uint4& x) const {
      Chunk<T> chunk = Chunk<T>::of(x);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        chunk.values[i] = fmaf(chunk.values[i], scale[i], shift[i]);
      }
      return chunk.template pack<true>();
    }
  };
};

// From the gradient of a batch norm's output to that of its input: a * gradient + (b * y + d).
// Blocks of the first columns write it, too.
struct BatchNormBackward {
  static constexpr int kTensors = 2;  // gradient and y
  static constexpr bool kTransforms = true;
  struct Parameters {
    const float *a, *b, *d;  // (K,), aligned to 16 bytes
    const void* y;
    void* grad_conv;
  };

  template <class T>
  struct Coefficients {
    float a[kChunk<T>], b[kChunk<T>], d[kChunk<T>];

    __device__ __forceinline__ Coefficients(const Parameters& p, int channel) {
      load_coefficients<T>(a, p.a + channel);
      load_coefficients<T>(b, p.b + channel);
      load_coefficients<T>(d, p.d + channel);
    }

    __device__ __forceinline__ uint4 apply(const uint4& gradient, const uint4& y) const {
      Chunk<T> chunk = Chunk<T>::of(gradient);
      const Chunk<T> output = Chunk<T>::of(y);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        chunk.values[i] = fmaf(a[i], chunk.values[i], fmaf(b[i], output.values[i], d[i]));
      }
      return chunk.pack();
    }
  };
};

// ---- Patches of the source, and the weight ----

constexpr uint32_t kColumnTap = 1u << 16;
constexpr uint32_t kNothing = 1u << 31;
constexpr int kNoChannel = 1 << 30;  // behind all of them

// Bit t says that source pixel `first` + t * dilation exists.
__device__ inline uint32_t existing_taps(const Axis& axis, int first) {
  const int d = axis.dilation.divisor();
  const int begin = first < 0 ? axis.dilation.divide(d - 1 - first) : 0;
  const int behind = first < axis.source ? axis.dilation.divide(axis.source - first + d - 1) : 0;
  const int end = behind < axis.taps ? behind : axis.taps;
  return end > begin ? (1u << end) - (1u << begin) : 0;
}

// Where a block works.
struct Place {
  int first_row;  // of the phase's pixels
  int group;
  int first_column;  // in the group
  int first_step, steps;
};

// Tap after tap and, in each, step by step through the channels: rows of patches and the weight
// that they are multiplied with. kTransposed: the weight's rows are the channels that are summed,
// not the columns of the result.
template <class Tile, class Prologue, bool kTransposed>
class Patches {
  using T = typename Tile::T;
  static constexpr int kThreads = Tile::kThreads;

 public:
  using A = SummedSideBySide<T, Tile::kM, kThreads>;
  using B = std::conditional_t<kTransposed, RowsSideBySide<T, Tile::kN, kThreads>,
                               SummedSideBySide<T, Tile::kN, kThreads>>;
  static constexpr bool kTransforms = Prologue::kTransforms;
  static constexpr uint32_t kOffsetOfB = A::kBytes * Prologue::kTensors;
  static constexpr uint32_t kStageBytes = kOffsetOfB + B::kBytes;

  __device__ __forceinline__ Patches(const ConvParameters& p, const Phase& phase,
                                     const typename Prologue::Parameters& prologue,
                                     const Place& place)
      : p_(p),
        phase_(phase),
        prologue_(prologue),
        chunk_(threadIdx.x % A::kChunks * kChunk<T>),
        first_channel_(place.group * p.source_group),
        ahead_(p, phase, place),
        behind_(ahead_),
        writes_(place.first_column == 0) {
    const int own_row = threadIdx.x / A::kChunks;
    const SharedAddress shared = ptx::dynamic_shared();
    to_a_ = shared + A::at(own_row, threadIdx.x % A::kChunks);
    // From the first image of the tile on, offsets have 32 bits in tensors of any size.
    const int first_image = phase.image_pixels.divide(place.first_row);
    source_ = static_cast<int64_t>(first_image) * p.source_pixels * p.source_pitch + first_channel_;
#pragma unroll
    for (int i = 0; i < A::kCopies; ++i) {
      const int row = place.first_row + own_row + i * A::kRowsApart;
      const int image = phase.image_pixels.divide(row);
      const int pixel = row - image * phase.image_pixels.divisor();
      const int y = phase.row_pixels.divide(pixel);
      const int x = pixel - y * phase.row_pixels.divisor();
      const int source_y = y * phase.rows.step + phase.rows.first;
      const int source_x = x * phase.columns.step + phase.columns.first;
      const int in_image = source_y * p.source_width + source_x;
      offset_a_[i] = ((image - first_image) * p.source_pixels + in_image) * p.source_pitch + chunk_;
      const uint32_t exists =
          existing_taps(phase.rows, source_y) | existing_taps(phase.columns, source_x) * kColumnTap;
      missing_[i] = row < phase.pixels ? ~exists : ~0u;
    }
    if constexpr (kTransposed) {
      const int column = place.first_column + threadIdx.x % B::kChunks * kChunk<T>;
      summed_ = threadIdx.x / B::kChunks;
      to_b_ = shared + kOffsetOfB + B::at(summed_, threadIdx.x % B::kChunks);
      offset_b_[0] = place.group * p.weight_group + summed_ * p.weight_pitch + column;
      if (column >= p.columns) summed_ = kNoChannel;
    } else {
      to_b_ = shared + kOffsetOfB + B::at(own_row, threadIdx.x % B::kChunks);
#pragma unroll
      for (int i = 0; i < B::kCopies; ++i) {
        // Columns that do not exist are computed like the last one, and never stored.
        const int column = place.first_column + own_row + i * B::kRowsApart;
        const int existing = column < p.columns ? column : p.columns - 1;
        offset_b_[i] = place.group * p.weight_group + existing * p.weight_pitch + chunk_;
      }
    }
  }

  __device__ __forceinline__ void copy(uint32_t stage, bool is_step) {
    const bool is_rest = !is_step || ahead_.channel + chunk_ >= p_.channels;
    const uint32_t taps = ahead_.taps | (is_rest ? kNothing : 0);
    const T* source = static_cast<const T*>(p_.source) + source_ + ahead_.source;
#pragma unroll
    for (int i = 0; i < A::kCopies; ++i) {
      const bool exists = (missing_[i] & taps) == 0;
      const SharedAddress to = to_a_ + stage + i * A::kBytesApart;
      ptx::copy_async(to, ptx::offset<sizeof(T)>(source, offset_a_[i]), exists);
    }
    if constexpr (Prologue::kTensors == 2) {
      const T* y = static_cast<const T*>(prologue_.y) + source_ + ahead_.source;
#pragma unroll
      for (int i = 0; i < A::kCopies; ++i) {
        const bool exists = (missing_[i] & taps) == 0;
        const SharedAddress to = to_a_ + stage + A::kBytes + i * A::kBytesApart;
        ptx::copy_async(to, ptx::offset<sizeof(T)>(y, offset_a_[i]), exists);
      }
    }
    const T* weight = static_cast<const T*>(p_.weight) + ahead_.weight;
#pragma unroll
    for (int i = 0; i < B::kCopies; ++i) {
      const SharedAddress to = to_b_ + stage + i * B::kBytesApart;
      if constexpr (kTransposed) {
        const int summed = i * B::kSummedApart;
        const bool exists = is_step && ahead_.channel + summed_ + summed < p_.channels;
        const int at = offset_b_[0] + summed * p_.weight_pitch;
        ptx::copy_async(to, ptx::offset<sizeof(T)>(weight, at), exists);
      } else {
        ptx::copy_async(to, ptx::offset<sizeof(T)>(weight, offset_b_[i]), !is_rest);
      }
    }
    ahead_.advance(p_, phase_);
  }

  // Applies the prologue, of a pointwise convolution, to what this thread has copied.
  __device__ __forceinline__ void transform(uint32_t stage, bool is_step) {
    if constexpr (kTransforms) {
      if (is_step && behind_.channel + chunk_ < p_.channels) {
        const typename Prologue::template Coefficients<T> coefficients(
            prologue_, first_channel_ + behind_.channel + chunk_);
#pragma unroll
        for (int i = 0; i < A::kCopies; ++i) {
          const SharedAddress at = to_a_ + stage + i * A::kBytesApart;
          const uint4 chunk = ptx::load_shared<uint4>(at);
          if constexpr (Prologue::kTensors == 1) {
            ptx::store_shared(at, coefficients.apply(chunk));
          } else {
            const uint4 result = coefficients.apply(chunk, ptx::load_shared<uint4>(at + A::kBytes));
            ptx::store_shared(at, result);
            if (writes_ && (missing_[i] & behind_.taps) == 0) {
              T* grad_conv = static_cast<T*>(prologue_.grad_conv) + source_ + behind_.source;
              store(reinterpret_cast<uint4*>(grad_conv + offset_a_[i]), result);
            }
          }
        }
      }
      behind_.advance(p_, phase_);
    }
  }

 private:
  // A step of the loop: how far it is from the first one.
  struct Step {
    int channel;
    uint32_t taps;  // the bits of what is missing that count: of a row and of a column
    int source, weight;

    __device__ __forceinline__ Step(const ConvParameters& p, const Phase& phase,
                                    const Place& place) {
      const int first = place.first_step / p.steps_of_tap;
      const int row = first / phase.columns.taps;
      channel = (place.first_step - first * p.steps_of_tap) * Tile::kSummed;
      taps = 1u << row | kColumnTap << (first - row * phase.columns.taps);
      const int steps_to_tap = p.steps_of_tap * Tile::kSummed;
      source =
          first * (phase.source_next_tap + steps_to_tap) + row * phase.source_next_row + channel;
      weight = phase.weight_first + first * (phase.weight_next_tap + steps_to_tap * pitch(p)) +
               row * phase.weight_next_row + channel * pitch(p);
    }

    static __device__ __forceinline__ int pitch(const ConvParameters& p) {
      return kTransposed ? p.weight_pitch : 1;
    }

    __device__ __forceinline__ void advance(const ConvParameters& p, const Phase& phase) {
      channel += Tile::kSummed;
      source += Tile::kSummed;
      weight += Tile::kSummed * pitch(p);
      if (channel < p.channels) return;
      channel = 0;
      source += phase.source_next_tap;
      weight += phase.weight_next_tap;
      const uint32_t row = taps & (kColumnTap - 1), next_column = (taps - row) << 1;
      if (next_column == kColumnTap << phase.columns.taps) {
        taps = row << 1 | kColumnTap;
        source += phase.source_next_row;
        weight += phase.weight_next_row;
      } else {
        taps = row | next_column;
      }
    }
  };

  const ConvParameters& p_;
  const Phase& phase_;
  const typename Prologue::Parameters& prologue_;
  const int chunk_;          // the thread's first channel in a step
  const int first_channel_;  // of the group
  Step ahead_, behind_;      // of what is copied, of what is transformed
  const bool writes_;
  SharedAddress to_a_, to_b_;
  int64_t source_;
  int offset_a_[A::kCopies];
  uint32_t missing_[A::kCopies];  // taps
  int offset_b_[kTransposed ? 1 : B::kCopies];
  int summed_ = 0;
};

}  // namespace resnet_fused
