// The CUDA shims of libtorch live in libtorch_cuda. Weak references let one extension load under a
// CPU-only torch too, where no CUDA tensor exists that could lead to a call of them.
#pragma once

#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg
