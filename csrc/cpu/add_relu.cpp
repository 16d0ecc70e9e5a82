// relu(x + residual) and its backward.
#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "cpu/tensors.h"

namespace resnet_fused::cpu {
namespace {

void check_pair(const char* op, const char* name, const Tensor& x, const char* other_name,
                const Tensor& other) {
  check_dense(op, name, x);
  check_like(op, other_name, other, name, x);
}

template <class Run>
void for_each_range(int64_t elements, const Run& run) {
  if (elements <= kGrain) {
    run(0, elements);
  } else {
    torch::stable::parallel_for(0, elements, kGrain, run);
  }
}

Tensor add_relu_cpu(const Tensor& x, const Tensor& residual) {
  check_pair("add_relu", "x", x, "residual", residual);
  const DType dtype = dtype_of("add_relu", "x", x);
  const auto kernel = kernels().add_relu[dtype];
  const int64_t size = static_cast<int64_t>(x.element_size());
  Tensor out = allocate_like(x);
  const char* px = static_cast<const char*>(x.const_data_ptr());
  const char* pr = static_cast<const char*>(residual.const_data_ptr());
  char* po = static_cast<char*>(out.mutable_data_ptr());
  for_each_range(x.numel(), [=](int64_t begin, int64_t end) {
    kernel(px + begin * size, pr + begin * size, po + begin * size, end - begin);
  });
  return out;
}

Tensor add_relu_backward_cpu(const Tensor& grad_out, const Tensor& out) {
  check_pair("add_relu_backward", "out", out, "grad_out", grad_out);
  const DType dtype = dtype_of("add_relu_backward", "out", out);
  const auto kernel = kernels().add_relu_backward[dtype];
  const int64_t size = static_cast<int64_t>(out.element_size());
  Tensor grad = allocate_like(out);
  const char* pg = static_cast<const char*>(grad_out.const_data_ptr());
  const char* po = static_cast<const char*>(out.const_data_ptr());
  char* pgrad = static_cast<char*>(grad.mutable_data_ptr());
  for_each_range(out.numel(), [=](int64_t begin, int64_t end) {
    kernel(pg + begin * size, po + begin * size, pgrad + begin * size, end - begin);
  });
  return grad;
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CPU, m) {
  m.impl("add_relu", TORCH_BOX(&resnet_fused::cpu::add_relu_cpu));
  m.impl("add_relu_backward", TORCH_BOX(&resnet_fused::cpu::add_relu_backward_cpu));
}
