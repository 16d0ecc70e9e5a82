// Schemas of every native operator. csrc/cpu and csrc/cuda register the implementations.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>

#include "common/schemas.h"
#include "cpu/isa.h"

namespace {

// Empty in a build without CUDA.
constexpr const char* kCudaArchs = RESNET_FUSED_CUDA_ARCHS;

// "8.0;9.0a" -> ["8.0", "9.0a"] as JSON.
std::string json_list(const std::string& separated) {
  std::string json = "[";
  for (size_t begin = 0; begin < separated.size();) {
    const size_t end = std::min(separated.find(';', begin), separated.size());
    json += (begin ? ", \"" : "\"") + separated.substr(begin, end - begin) + "\"";
    begin = end + 1;
  }
  return json + "]";
}

std::string build_info() {
  const std::string cuda = *kCudaArchs ? "true" : "false";
  return "{\"cuda\": " + cuda + ", \"archs\": " + json_list(kCudaArchs) +
         ", \"compiler\": \"" __VERSION__ "\", \"isa\": \"" + resnet_fused_cpu_isa() +
         "\", \"convolutions\": " + json_list(resnet_fused_cpu_convolutions()) + "}";
}

}  // namespace

STABLE_TORCH_LIBRARY(resnet_fused_native, m) {
  for (const char* schema : resnet_fused::kKernelSchemas) m.def(schema);
  m.def(
      "residual_blocks(Tensor x, Tensor[] weights, Tensor[] shifts, int[] geometry, "
      "int[] convolutions, int[] projections) -> Tensor");
  m.def(
      "direct_network(Tensor x, Tensor[] weights, Tensor[] shifts, int[] geometry, "
      "int[] convolutions, int[] projections, bool stem) -> Tensor");
  m.def(
      "residual_block_forward(Tensor x, Tensor? residual, Tensor?[] parameters, int[] geometry, "
      "int[] training, float[] momentum_and_eps, bool has_projection) -> Tensor[]");
  m.def(
      "residual_block_backward(Tensor grad_out, Tensor out, Tensor x, Tensor?[] kept, "
      "Tensor?[] parameters, int[] geometry, int[] training, float[] momentum_and_eps, "
      "bool has_projection, int[] needed) -> Tensor[]");
  m.def("fingerprint(Tensor[] tensors, int samples) -> int");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
