// Schemas of the operators that have CUDA kernels: of the extension, and of the emulator, which
// runs the same kernels on a CPU.
#pragma once

namespace resnet_fused {

inline constexpr const char* kKernelSchemas[] = {
    "add_relu(Tensor x, Tensor residual) -> Tensor",
    "add_relu_backward(Tensor grad_out, Tensor out) -> Tensor",
    "bn_relu(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, Tensor? residual, "
    "bool residual_bn, Tensor? residual_weight, Tensor? residual_bias, "
    "Tensor(c!)? residual_running_mean, Tensor(d!)? residual_running_var, "
    "bool residual_training, float residual_momentum, float residual_eps, bool relu, "
    "bool save_mask) "
    "-> (Tensor out, Tensor mean, Tensor invstd, Tensor residual_mean, Tensor residual_invstd, "
    "Tensor mask)",
    "bn_relu_apply(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
    "bool relu) -> Tensor",
    "bn_relu_backward(Tensor grad_out, Tensor x, Tensor? out, Tensor? mask, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor invstd, bool training, bool has_residual, "
    "Tensor? residual, bool residual_bn, Tensor? residual_weight, Tensor? residual_bias, "
    "Tensor? residual_mean, Tensor? residual_invstd, bool residual_training, bool relu) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual, "
    "Tensor grad_residual_weight, Tensor grad_residual_bias)",
    "bn_relu_max_pool(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, int[] kernel_size, "
    "int[] stride, int[] padding) -> (Tensor out, Tensor mean, Tensor invstd, Tensor argmax)",
    "bn_relu_max_pool_backward_sums(Tensor grad_out, Tensor x, Tensor argmax, Tensor mean, "
    "int[] kernel_size, int[] stride, int[] padding) -> Tensor",
    "bn_relu_max_pool_backward_apply(Tensor grad_out, Tensor x, Tensor argmax, Tensor? weight, "
    "Tensor mean, Tensor invstd, bool training, Tensor averages, int[] kernel_size, "
    "int[] stride, int[] padding) -> Tensor",
    "bn_relu_backward_sums(Tensor grad_out, Tensor x, Tensor? out, Tensor? mask, Tensor? weight, "
    "Tensor? bias, Tensor mean, Tensor invstd, Tensor? residual, bool residual_bn, "
    "Tensor? residual_weight, Tensor? residual_bias, Tensor? residual_mean, "
    "Tensor? residual_invstd, bool relu) -> Tensor",
    "bn_relu_backward_apply(Tensor grad_out, Tensor x, Tensor? out, Tensor? mask, "
    "Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, bool training, bool has_residual, "
    "Tensor? residual, bool residual_bn, Tensor? residual_weight, Tensor? residual_bias, "
    "Tensor? residual_mean, Tensor? residual_invstd, bool residual_training, bool relu, "
    "Tensor averages) -> (Tensor grad_x, Tensor grad_residual)",
    "bn_statistics(Tensor x) -> (Tensor mean, Tensor m2)",
    // Of convolutions: geometry is stride, padding, dilation (2 each) and groups; tf32 is for
    // float32; tile, splits: a configuration, or -1 and 0 to have it chosen.
    "conv_bn_relu(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, "
    "bool relu, int[] geometry, bool tf32, int tile, int splits) -> Tensor",
    "conv_bn_relu_(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor(a!) residual, "
    "bool relu, int[] geometry, bool tf32, int tile, int splits) -> ()",
    "conv_projection_relu(Tensor y, Tensor weight, Tensor scale, Tensor shift, Tensor x, "
    "Tensor projection_weight, Tensor projection_scale, Tensor projection_shift, int[] stride, "
    "bool tf32, int tile, int splits) -> Tensor",
    "conv_stats(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int[] geometry, bool tf32, "
    "int tile, int splits) -> (Tensor y, Tensor mean, Tensor m2)",
    "conv_dgrad(Tensor grad_y, Tensor weight, int[] input_size, Tensor? y, Tensor? coefficients, "
    "Tensor? residual, Tensor? x, Tensor? scale, Tensor? shift, Tensor? mask, Tensor? mean, "
    "Tensor? output_scale, int[] geometry, bool tf32, int tile, int splits) "
    "-> (Tensor grad_x, Tensor sum_grad, Tensor sum_grad_x, Tensor grad_conv)",
    "conv_wgrad(Tensor grad_y, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, "
    "Tensor? output_scale, int[] geometry, bool tf32, int tile, int splits) -> Tensor",
    // Of a bottleneck in inference: all but its first convolution.
    "bottleneck_tail(Tensor y1, Tensor residual, Tensor weight2, Tensor scale2, Tensor shift2, "
    "Tensor weight3, Tensor scale3, Tensor shift3) -> Tensor",
    // And with the first convolution of the next one.
    "bottleneck_roll(Tensor y1, Tensor residual, Tensor weight2, Tensor scale2, Tensor shift2, "
    "Tensor weight3, Tensor scale3, Tensor shift3, Tensor next_weight1, Tensor next_scale1, "
    "Tensor next_shift1) -> (Tensor out, Tensor next_y1)",
    "bottleneck_block(Tensor x, Tensor weight1, Tensor scale1, Tensor shift1, Tensor weight2, "
    "Tensor scale2, Tensor shift2, Tensor weight3, Tensor scale3, Tensor shift3) -> Tensor",
};

}  // namespace resnet_fused
