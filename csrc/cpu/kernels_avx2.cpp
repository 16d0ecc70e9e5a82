// Inner loops for AVX2 with F16C.
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

// To the end of the file, so that template instantiations get it too.
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define RESNET_FUSED_ISA avx2
#define RESNET_FUSED_VECTOR_BYTES 32
#define RESNET_FUSED_AVX2
#include "cpu/kernels.inl"

namespace resnet_fused::cpu {
const Kernels* avx2_kernels() {
  static constexpr Kernels table = avx2::make_kernels("avx2");
  return &table;
}
}  // namespace resnet_fused::cpu
#else
namespace resnet_fused::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace resnet_fused::cpu
#endif
