// Inner loops for whatever the compiler targets by default.
#define RESNET_FUSED_ISA default_isa
#define RESNET_FUSED_VECTOR_BYTES 16
#include "cpu/kernels.inl"

namespace resnet_fused::cpu {
const Kernels* default_kernels() {
  static constexpr Kernels table = default_isa::make_kernels("default");
  return &table;
}
}  // namespace resnet_fused::cpu
