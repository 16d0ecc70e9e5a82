// fingerprint: one number that changes when the storage, dtype, shape or (sampled) contents of any
// of the tensors change. Reads at most `samples` elements of each; all of them when samples < 0.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace resnet_fused::cpu {
namespace {

using torch::stable::Tensor;

// splitmix64's finaliser over the running value and the next one.
uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) + 0x9e3779b97f4a7c15u;
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
  return hash ^ (hash >> 31);
}

// Where element `index`, counted in row-major order, lies in memory.
int64_t offset_of(const Tensor& tensor, int64_t index) {
  int64_t offset = 0;
  for (int64_t dim = tensor.dim() - 1; dim >= 0; --dim) {
    offset += index % tensor.size(dim) * tensor.stride(dim);
    index /= tensor.size(dim);
  }
  return offset;
}

uint64_t fingerprint_of(const Tensor& tensor, int64_t samples) {
  const int64_t elements = tensor.numel();
  const size_t size = tensor.element_size();
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  uint64_t hash = mix(static_cast<uint64_t>(tensor.scalar_type()), elements);
  hash = mix(hash, reinterpret_cast<uintptr_t>(data));
  const int64_t count = samples < 0 ? elements : std::min(samples, elements);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = i * (elements - 1) / std::max<int64_t>(count - 1, 1);
    uint64_t bits = 0;
    std::memcpy(&bits, data + offset_of(tensor, index) * size, std::min(size, sizeof(bits)));
    hash = mix(hash, bits);
  }
  return hash;
}

int64_t fingerprint(std::vector<Tensor> tensors, int64_t samples) {
  uint64_t hash = tensors.size();
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.is_cpu(), "fingerprint: tensors must be on the CPU");
    hash = mix(hash, fingerprint_of(tensor, samples));
  }
  return static_cast<int64_t>(hash);
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CPU, m) {
  m.impl("fingerprint", TORCH_BOX(&resnet_fused::cpu::fingerprint));
}
