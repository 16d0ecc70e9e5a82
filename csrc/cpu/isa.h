// Which instruction set's inner loops run: the best this CPU has, or RESNET_FUSED_CPU_ISA.
#pragma once

#include "cpu/kernels.h"

namespace resnet_fused::cpu {

// Throws when RESNET_FUSED_CPU_ISA names something unknown or unsupported here.
const Kernels& kernels();

}  // namespace resnet_fused::cpu

// "default", "avx2", "avx512" or "avx512_bf16", or what is wrong with RESNET_FUSED_CPU_ISA; never
// throws.
const char* resnet_fused_cpu_isa();

// The dtypes that direct convolutions have inner loops for here, separated by ";".
const char* resnet_fused_cpu_convolutions();
