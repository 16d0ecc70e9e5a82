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

struct Choice {
  const Kernels* kernels = nullptr;
  std::string problem;
};

Choice choose() {
  const Kernels* avx512 = cpu_has_avx512() ? avx512_kernels() : nullptr;
  const Kernels* avx2 = cpu_has_avx2() ? avx2_kernels() : nullptr;
  const char* variable = std::getenv("RESNET_FUSED_CPU_ISA");
  std::string wish = variable ? variable : "";
  // The text may end up in JSON.
  for (char& c : wish) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '?';
  if (wish.empty()) return {avx512 ? avx512 : avx2 ? avx2 : default_kernels(), ""};
  if (wish == "default") return {default_kernels(), ""};
  if (wish != "avx2" && wish != "avx512") {
    return {nullptr, "RESNET_FUSED_CPU_ISA must be default, avx2 or avx512, got " + wish};
  }
  const Kernels* kernels = wish == "avx2" ? avx2 : avx512;
  if (!kernels) {
    return {nullptr,
            "RESNET_FUSED_CPU_ISA must name an instruction set of this CPU and build, "
            "got " +
                wish + " (unset it)"};
  }
  return {kernels, ""};
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
