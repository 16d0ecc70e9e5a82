#include "cpu/isa.h"

#include <torch/headeronly/util/Exception.h>

#include <cctype>
#include <cstdlib>
#include <string>

namespace resnet_fused::cpu {
namespace {

bool cpu_has_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool cpu_has_avx512() {
#if defined(__x86_64__) && defined(__GNUC__)
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool cpu_has_avx512_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
  return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

struct Choice {
  const Kernels* kernels = nullptr;
  std::string problem;
};

Choice choose() {
  // Worst first; null where this CPU or this build lacks one.
  struct {
    const char* name;
    const Kernels* kernels;
  } const candidates[] = {
      {"default", default_kernels()},
      {"avx2", cpu_has_avx2() ? avx2_kernels() : nullptr},
      {"avx512", cpu_has_avx512() ? avx512_kernels() : nullptr},
      {"avx512_bf16", cpu_has_avx512_bf16() ? avx512_bf16_kernels() : nullptr},
  };
  const char* variable = std::getenv("RESNET_FUSED_CPU_ISA");
  const std::string wish = variable ? variable : "";
  Choice choice;
  choice.problem = "RESNET_FUSED_CPU_ISA must be default, avx2, avx512 or avx512_bf16, got ";
  // The text may end up in JSON.
  for (const unsigned char c : wish) choice.problem += std::isalnum(c) || c == '_' ? c : '?';
  for (const auto& candidate : candidates) {
    if (!wish.empty() && wish != candidate.name) continue;
    if (candidate.kernels) {
      choice.kernels = candidate.kernels;
    } else if (!wish.empty()) {
      choice.problem =
          "RESNET_FUSED_CPU_ISA must name an instruction set of this CPU and build, "
          "got " +
          wish + " (unset it)";
    }
  }
  return choice;
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels() {
  const Choice& chosen = choice();
  STD_TORCH_CHECK(chosen.kernels != nullptr, "resnet_fused: ", chosen.problem);
  return *chosen.kernels;
}

}  // namespace resnet_fused::cpu

const char* resnet_fused_cpu_isa() {
  const auto& chosen = resnet_fused::cpu::choice();
  return chosen.kernels ? chosen.kernels->name : chosen.problem.c_str();
}

const char* resnet_fused_cpu_convolutions() {
  using namespace resnet_fused::cpu;
  const Kernels* kernels = choice().kernels;
  if (!kernels || !kernels->convolution_tile[kFloat32][1]) return "";
  return kernels->convolution_tile[kBFloat16][1] ? "float32;bfloat16" : "float32";
}
