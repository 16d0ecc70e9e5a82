// PTX instructions that CUDA C++ has no words for: asynchronous copies to shared memory, matrix
// fragments and products of the tensor cores (sm_80 and up). The emulator has a twin of each.
//
// PTX ISA, "Warp-level matrix instructions" and "Asynchronous data movement". A warp's lane l holds
// of 8x8 matrices of 16-bit elements, or 8x4 ones of 32-bit elements, the 4 bytes at row l / 4,
// column l % 4: two neighbouring elements, or one.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "cuda/platform.h"

namespace resnet_fused::ptx {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// 32-bit floats of which a product sees the first 10 bits of the fraction.
struct Tf32 {};

// An address in shared memory, in bytes.
using SharedAddress = uint32_t;
constexpr uint32_t kSharedAlignment = 256;

__device__ __forceinline__ float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
__device__ __forceinline__ uint32_t bits_of(float value) {
  return __builtin_bit_cast(uint32_t, value);
}

}  // namespace resnet_fused::ptx

#ifdef RESNET_FUSED_EMULATE
#include "emulator/ptx.h"
#else

namespace resnet_fused::ptx {

// Of the launch's dynamic shared memory; a multiple of kSharedAlignment, so that bits below it can
// be flipped in an address.
__device__ __forceinline__ SharedAddress dynamic_shared() {
  extern __shared__ __align__(kSharedAlignment) unsigned char resnet_fused_aligned_shared[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(resnet_fused_aligned_shared));
}

// One access of 4, 8 or 16 bytes.
template <class V>
__device__ __forceinline__ V load_shared(SharedAddress from) {
  check_access_type<V>();
  static_assert(sizeof(V) >= 4);
  V value;
  if constexpr (sizeof(V) == 4) {
    uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
    value = *reinterpret_cast<V*>(&word);
  } else if constexpr (sizeof(V) == 8) {
    uint2 words;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(words.x), "=r"(words.y)
                 : "r"(from)
                 : "memory");
    value = *reinterpret_cast<V*>(&words);
  } else {
    uint4 words;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(from)
                 : "memory");
    value = *reinterpret_cast<V*>(&words);
  }
  return value;
}

// One access of 2, 4, 8 or 16 bytes.
template <class V>
__device__ __forceinline__ void store_shared(SharedAddress to, V value) {
  check_access_type<V>();
  static_assert(sizeof(V) >= 2);
  if constexpr (sizeof(V) == 2) {
    const uint16_t word = *reinterpret_cast<const uint16_t*>(&value);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(word) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(&value);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(&value);
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(words.x), "r"(words.y)
                 : "memory");
  } else {
    const uint4 words = *reinterpret_cast<const uint4*>(&value);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y),
                 "r"(words.z), "r"(words.w)
                 : "memory");
  }
}

// base + kBytes * elements, in one instruction.
template <int kBytes>
__device__ __forceinline__ const void* offset(const void* base, int elements) {
  uint64_t address;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(elements), "n"(kBytes), "l"(base));
  return reinterpret_cast<const void*>(address);
}

// Brings the 128 bytes around an address in global memory to the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

// Starts a copy of 16 bytes from global to shared memory, or of 16 zeros where there is nothing
// `from` which to read. Nobody may touch them before the thread has waited for the copy.
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, bool exists) {
  asm volatile(
      "{\n"
      "  .reg .pred p;\n"
      "  setp.eq.u32 p, %2, 0;\n"
      "  cp.async.cg.shared.global.L2::128B [%0], [%1], 16, p;\n"
      "}\n" ::"r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(static_cast<unsigned>(exists))
      : "memory");
}

// What this thread has started since the last call becomes a group.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups of this thread but the kPending newest ones. Other threads see what was
// copied after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 rows with 16 bytes each, one for each element of `fragment`. Lane l says where
// row l % 8 of matrix l / 8 is.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row)
               : "memory");
}

// The same of 16-bit elements, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4],
                                                         SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row)
               : "memory");
}

// sum += a @ b of one 16x8 tile, over 32 bytes of each row: 16 elements of 16 bits, 8 of 32.
template <class T>
__device__ __forceinline__ void multiply_add_tile(float (&sum)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
#define RESNET_FUSED_MMA(shape, type)                                   \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type           \
      ".f32 "                                                           \
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, BFloat16>) {
    RESNET_FUSED_MMA("m16n8k16", "bf16");
  } else if constexpr (std::is_same_v<T, Half>) {
    RESNET_FUSED_MMA("m16n8k16", "f16");
  } else {
    static_assert(std::is_same_v<T, Tf32>);
    RESNET_FUSED_MMA("m16n8k8", "tf32");
  }
#undef RESNET_FUSED_MMA
}

// sum += a @ b of a warp's (16 * kRows) x (8 * kColumns) tile. sum[i][j]: rows 16 * i + lane / 4
// and 8 more, columns 8 * j + 2 * (lane % 4) and the next; a[i]: matrices (rows 0-7, first half),
// (rows 8-15, first half), (rows 0-7, second half), (rows 8-15, second half); b[j]: both halves of
// 8 columns. Every other row runs backwards: then neighbouring products share an operand.
template <class T, int kRows, int kColumns>
__device__ __forceinline__ void multiply_add(float (&sum)[kRows][kColumns][4],
                                             const uint32_t (&a)[kRows][4],
                                             const uint32_t (&b)[kColumns][2]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      const int j = i % 2 == 0 ? k : kColumns - 1 - k;
      multiply_add_tile<T>(sum[i][j], a[i], b[j]);
    }
  }
}

// The nearest number with 10 bits of fraction, ties away from zero. NaN keeps its upper bits: one
// without any, which no arithmetic results in, becomes infinity.
__device__ __forceinline__ uint32_t round_to_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

// Two numbers, rounded to nearest even; the first one in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  } else {
    static_assert(std::is_same_v<T, Half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  }
  return packed;
}

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  float2 values;
  if constexpr (std::is_same_v<T, BFloat16>) {
    values.x = float_of(packed << 16);
    values.y = float_of(packed & 0xffff0000u);
  } else {
    static_assert(std::is_same_v<T, Half>);
    asm("{\n"
        "  .reg .b16 first, second;\n"
        "  mov.b32 {first, second}, %2;\n"
        "  cvt.f32.f16 %0, first;\n"
        "  cvt.f32.f16 %1, second;\n"
        "}\n"
        : "=f"(values.x), "=f"(values.y)
        : "r"(packed));
  }
  return values;
}

// pack(relu(first), relu(second)). NaN stays NaN, as in torch.relu.
template <class T>
__device__ __forceinline__ uint32_t pack_relu(float first, float second) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  } else {
    static_assert(std::is_same_v<T, Half>);
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  }
  return packed;
}

}  // namespace resnet_fused::ptx

#endif
