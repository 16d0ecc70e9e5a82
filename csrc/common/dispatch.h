// From a tensor's run-time dtype to a C++ type.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/checks.h"

namespace resnet_fused {

using torch::headeronly::ScalarType;

// Calls body(T{}) with the element type of `dtype`: float, double, Half or BFloat16.
template <class Body>
void dispatch_floating(const char* op, const char* argument, ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      fail(op, ": ", argument, " must be float32, float64, float16 or bfloat16, got ",
           torch::headeronly::toString(dtype));
  }
}

// The same without float64.
template <class Body>
void dispatch_up_to_float32(const char* op, const char* argument, ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    default:
      fail(op, ": ", argument, " must be float32, float16 or bfloat16, got ",
           torch::headeronly::toString(dtype));
  }
}

}  // namespace resnet_fused
