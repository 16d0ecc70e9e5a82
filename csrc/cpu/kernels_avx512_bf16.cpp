// Inner loops for AVX-512 with BF16, which rounds to bfloat16 in one instruction.
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// GCC 12 finds its own _mm512_undefined_pd() uninitialised.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

// To the end of the file, so that template instantiations get it too.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2")
#define RESNET_FUSED_ISA avx512_bf16
#define RESNET_FUSED_VECTOR_BYTES 64
#define RESNET_FUSED_AVX512
#define RESNET_FUSED_AVX512BF16
#include "cpu/kernels.inl"

namespace resnet_fused::cpu {
const Kernels* avx512_bf16_kernels() {
  static constexpr Kernels table = avx512_bf16::make_kernels("avx512_bf16");
  return &table;
}
}  // namespace resnet_fused::cpu
#else
namespace resnet_fused::cpu {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace resnet_fused::cpu
#endif
