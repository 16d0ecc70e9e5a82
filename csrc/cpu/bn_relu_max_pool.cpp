// Batch norm, ReLU and max pooling; the two halves of its backward.
#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "cpu/batch_norm.h"

namespace resnet_fused::cpu {
namespace {

using Ints = std::vector<int64_t>;

PoolingAxis pooling_axis(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return {size, stride < 1 ? 0 : (size + 2 * padding - kernel) / stride + 1, kernel, stride,
          padding};
}

// An activation as a task sees it. Tasks read `in` or write `out`.
struct Activation {
  const void* in;
  void* out;
  int64_t element, plane;  // bytes of an element, pixels of an image
};

template <class T>
void planes_to_pixels(const void* from, void* to, int64_t plane, int64_t channels, int64_t pixel) {
  constexpr int64_t kTile = 64;  // pixels whose cache lines are filled channel by channel
  for (int64_t begin = 0; begin < plane; begin += kTile) {
    const int64_t end = std::min(begin + kTile, plane);
    for (int64_t c = 0; c < channels; ++c) {
      const T* p = static_cast<const T*>(from) + c * plane;
      T* pixels = static_cast<T*>(to) + c;
      for (int64_t i = begin; i < end; ++i) pixels[i * pixel] = p[i];
    }
  }
}

template <class T>
void pixels_to_planes(const void* from, void* to, int64_t plane, int64_t channels, int64_t pixel) {
  for (int64_t c = 0; c < channels; ++c) {
    const T* pixels = static_cast<const T*>(from) + c;
    T* p = static_cast<T*>(to) + c * plane;
    for (int64_t i = 0; i < plane; ++i) p[i] = pixels[i * pixel];
  }
}

template <class Body>
void dispatch_size(int64_t element, const Body& body) {
  switch (element) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint64_t{});
  }
}

// Images that are pooled a block of channels at a time. Those in channels_last are read and written
// where they are; of NCHW a few planes are copied to and from pixels that lie like theirs.
class Images {
 public:
  PoolingAxis rows, columns;

  Images(const char* op, const Tensor& x, const Ints& kernel_size, const Ints& stride,
         const Ints& padding)
      : batch_(x.size(0)), channels_(x.size(1)), channels_last_(!is_nchw_contiguous(x)) {
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
                    ": kernel_size, stride and padding must be two numbers each");
    rows = pooling_axis(x.size(2), kernel_size[0], stride[0], padding[0]);
    columns = pooling_axis(x.size(3), kernel_size[1], stride[1], padding[1]);
    for (const PoolingAxis& axis : {rows, columns}) {
      STD_TORCH_CHECK(axis.kernel >= 1 && axis.stride >= 1 && axis.padding >= 0 &&
                          2 * axis.padding <= axis.kernel && axis.size >= 1 &&
                          axis.kernel <= axis.size + 2 * axis.padding,
                      op, ": padding must be at most half of kernel_size, and x must have room for",
                      " a window, got x of shape ", to_string(x.sizes()), " and kernel_size ",
                      to_string(kernel_size));
    }
    STD_TORCH_CHECK(rows.kernel * columns.kernel <= kClosed, op, ": kernel_size must have at most ",
                    kClosed, " places, got ", to_string(kernel_size));
  }

  Tensor allocate_pooled(int32_t dtype) const {
    const int64_t h = rows.out_size, w = columns.out_size, c = channels_;
    const int64_t sizes[] = {batch_, c, h, w};
    const int64_t nchw[] = {c * h * w, h * w, w, 1}, channels_last[] = {c * h * w, 1, w * c, c};
    return empty_strided({sizes, 4}, {channels_last_ ? channels_last : nchw, 4}, dtype);
  }

  void check_pooled(const char* op, const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 4 && t.size(0) == batch_ && t.size(1) == channels_ &&
                        t.size(2) == rows.out_size && t.size(3) == columns.out_size,
                    op, ": ", name, " must have the shape of the pooled x, got ",
                    to_string(t.sizes()));
    STD_TORCH_CHECK(
        t.numel() == 0 || (channels_last_ ? is_channels_last(t) : is_nchw_contiguous(t)), op, ": ",
        name, " must have the memory format of x, got strides ", to_string(t.strides()));
  }

  Activation whole(const void* in, void* out, int64_t element) const {
    return {in, out, element, rows.size * columns.size};
  }
  Activation pooled(const void* in, void* out, int64_t element) const {
    return {in, out, element, rows.out_size * columns.out_size};
  }

  // Rows of all images that make up for waking another thread.
  int64_t grain(int64_t rows_per_image, int64_t width) const {
    return channels_last_ ? std::max<int64_t>(1, kGrain / (width * channels_)) : rows_per_image;
  }
  // The same for sums: by shape alone, so that results do not depend on the number of threads.
  int64_t chunk() const {
    const int64_t height = rows.out_size, elements = columns.out_size * channels_;
    if (!channels_last_)
      return height * std::max<int64_t>(1, ceil_div(batch_, Geometry::kMaxChunks));
    return std::max(ceil_div(batch_ * height, Geometry::kMaxChunks),
                    ceil_div(Geometry::kChunkElements, elements));
  }
  int64_t chunks() const { return ceil_div(batch_ * rows.out_size, chunk()); }

  // Calls run(chunk, first channel, pooling, pointers to the image of each activation, begin, end)
  // for rows [begin, end) of an image, which has `height` of them, in parallel, but for the images
  // of one chunk of rows.
  template <size_t kActivations, class Run>
  void for_each_part(int64_t height, int64_t chunk_rows,
                     const std::array<Activation, kActivations>& activations,
                     const Run& run) const {
    const int64_t all_rows = batch_ * height, chunks = ceil_div(all_rows, chunk_rows);
    const int64_t block = channels_last_ ? kMaxSumColumns : Geometry::kPlaneWidth;
    const int64_t blocks = ceil_div(channels_, block);
    torch::stable::parallel_for(0, chunks * blocks, 1, [&](int64_t begin, int64_t end) {
      std::array<std::vector<uint64_t>, kActivations> buffers;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t chunk = task / blocks, channel = task % blocks * block;
        const Pooling pool{rows, columns, channels_last_ ? channels_ : block,
                           std::min(block, channels_ - channel)};
        const int64_t last = std::min((chunk + 1) * chunk_rows, all_rows);
        for (int64_t row = chunk * chunk_rows; row < last;) {
          const int64_t image = row / height, first = row % height;
          const int64_t count = std::min(height - first, last - row);
          const auto pointers = enter(image, channel, pool, activations, buffers);
          run(chunk, channel, pool, pointers, first, first + count);
          leave(image, channel, pool, activations, buffers);
          row += count;
        }
      }
    });
  }

 private:
  int64_t plane_offset(int64_t image, int64_t channel, const Activation& a) const {
    return (image * channels_ + channel) * a.plane;
  }

  template <size_t kActivations>
  std::array<void*, kActivations> enter(
      int64_t image, int64_t channel, const Pooling& pool,
      const std::array<Activation, kActivations>& activations,
      std::array<std::vector<uint64_t>, kActivations>& buffers) const {
    std::array<void*, kActivations> pointers;
    for (size_t i = 0; i < kActivations; ++i) {
      const Activation& a = activations[i];
      void* whole = a.out ? a.out : const_cast<void*>(a.in);
      if (channels_last_) {
        pointers[i] = offset(whole, image * channels_ * a.plane + channel, a.element);
        continue;
      }
      buffers[i].resize(ceil_div(a.plane * pool.pixel * a.element, sizeof(uint64_t)));
      pointers[i] = buffers[i].data();
      if (a.out) continue;
      dispatch_size(a.element, [&](auto element) {
        planes_to_pixels<decltype(element)>(
            offset(a.in, plane_offset(image, channel, a), a.element), pointers[i], a.plane,
            pool.channels, pool.pixel);
      });
    }
    return pointers;
  }

  template <size_t kActivations>
  void leave(int64_t image, int64_t channel, const Pooling& pool,
             const std::array<Activation, kActivations>& activations,
             const std::array<std::vector<uint64_t>, kActivations>& buffers) const {
    for (size_t i = 0; i < kActivations; ++i) {
      const Activation& a = activations[i];
      if (channels_last_ || !a.out) continue;
      dispatch_size(a.element, [&](auto element) {
        pixels_to_planes<decltype(element)>(
            buffers[i].data(), offset(a.out, plane_offset(image, channel, a), a.element), a.plane,
            pool.channels, pool.pixel);
      });
    }
  }

  int64_t batch_, channels_;
  bool channels_last_;
};

template <class A>
Columns<A> columns_of(Normalised<A> bn) {
  std::vector<A> scale(bn.mean.size());
  for (size_t c = 0; c < scale.size(); ++c) scale[c] = bn.weight[c] * bn.invstd[c];
  return {std::move(bn.mean), std::move(scale), std::move(bn.bias)};
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class A>
ForwardResult forward(const char* op, const Images& images, const Tensor& x, DType dtype,
                      const BatchNorm& bn) {
  Normalised<A> normalised = normalise<A>(op, Geometry(x), x, dtype, bn);
  Tensor mean = to_tensor<A>(normalised.mean), invstd = to_tensor<A>(normalised.invstd);
  const Columns<A> columns = columns_of(std::move(normalised));
  Tensor out = images.allocate_pooled(dtype_code(x));
  Tensor argmax = images.allocate_pooled(aoti_torch_dtype_uint8());
  const int64_t size = static_cast<int64_t>(x.element_size());
  const std::array activations{images.whole(x.const_data_ptr(), nullptr, size),
                               images.pooled(nullptr, out.mutable_data_ptr(), size),
                               images.pooled(nullptr, argmax.mutable_data_ptr(), 1)};
  const auto kernel = kernels().max_pool[dtype];
  const int64_t height = images.rows.out_size;
  images.for_each_part(height, images.grain(height, images.columns.out_size), activations,
                       [&](int64_t, int64_t channel, const Pooling& pool, const auto& pointers,
                           int64_t begin, int64_t end) {
                         const MaxPoolArgs args{pointers[0], columns.at(channel), pointers[1],
                                                static_cast<uint8_t*>(pointers[2])};
                         kernel(pool, args, begin, end);
                       });
  return {out, mean, invstd, argmax};
}

ForwardResult bn_relu_max_pool_cpu(const Tensor& x, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var, bool training,
                                   double momentum, double eps, const Ints& kernel_size,
                                   const Ints& stride, const Ints& padding) {
  const char* op = "bn_relu_max_pool";
  check_4d(op, "x", x);
  const DType dtype = dtype_of(op, "x", x);
  const Images images(op, x, kernel_size, stride, padding);
  const BatchNorm bn{"", weight, bias, running_mean, running_var, training, momentum, eps};
  return dtype == kFloat64 ? forward<double>(op, images, x, dtype, bn)
                           : forward<float>(op, images, x, dtype, bn);
}

void check_backward(const char* op, const Images& images, const Tensor& grad_out, const Tensor& x,
                    const Tensor& argmax) {
  images.check_pooled(op, "grad_out", grad_out);
  images.check_pooled(op, "argmax", argmax);
  STD_TORCH_CHECK(grad_out.scalar_type() == x.scalar_type(), op,
                  ": grad_out must have the dtype of x");
  STD_TORCH_CHECK(argmax.scalar_type() == ScalarType::Byte, op, ": argmax must be of uint8");
}

template <class A>
Tensor backward_sums(const char* op, const Images& images, const Tensor& grad_out, const Tensor& x,
                     const Tensor& argmax, const Tensor& mean, DType dtype) {
  const int64_t channels = x.size(1), chunks = images.chunks();
  const std::vector<A> means = read_channels<A>(op, "mean", mean, channels, 0);
  // [chunk][sum][channel]
  std::vector<double> partial(2 * chunks * channels);
  const int64_t size = static_cast<int64_t>(x.element_size());
  const std::array activations{images.pooled(grad_out.const_data_ptr(), nullptr, size),
                               images.whole(x.const_data_ptr(), nullptr, size),
                               images.pooled(argmax.const_data_ptr(), nullptr, 1)};
  const auto kernel = kernels().max_pool_sums[dtype];
  images.for_each_part(images.rows.out_size, images.chunk(), activations,
                       [&](int64_t chunk, int64_t channel, const Pooling& pool,
                           const auto& pointers, int64_t begin, int64_t end) {
                         double* sums = &partial[2 * chunk * channels + channel];
                         const MaxPoolSumsArgs args{pointers[0],
                                                    pointers[1],
                                                    static_cast<const uint8_t*>(pointers[2]),
                                                    means.data() + channel,
                                                    sums,
                                                    sums + channels};
                         kernel(pool, args, begin, end);
                       });
  const int64_t sizes[] = {2, channels}, strides[] = {channels, 1};
  Tensor result = empty_strided({sizes, 2}, {strides, 2}, arithmetic_dtype_code<A>());
  A* totals = static_cast<A*>(result.mutable_data_ptr());
  for (int64_t i = 0; i < 2 * channels; ++i) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[2 * chunk * channels + i];
    totals[i] = static_cast<A>(total);
  }
  return result;
}

Tensor bn_relu_max_pool_backward_sums_cpu(const Tensor& grad_out, const Tensor& x,
                                          const Tensor& argmax, const Tensor& mean,
                                          const Ints& kernel_size, const Ints& stride,
                                          const Ints& padding) {
  const char* op = "bn_relu_max_pool_backward_sums";
  check_4d(op, "x", x);
  const DType dtype = dtype_of(op, "x", x);
  const Images images(op, x, kernel_size, stride, padding);
  check_backward(op, images, grad_out, x, argmax);
  const auto run = [&](auto arithmetic) {
    return backward_sums<decltype(arithmetic)>(op, images, grad_out, x, argmax, mean, dtype);
  };
  return dtype == kFloat64 ? run(double{}) : run(float{});
}

template <class A>
Tensor backward_apply(const char* op, const Images& images, const Tensor& grad_out, const Tensor& x,
                      const Tensor& argmax, const OptionalTensor& weight, const Tensor& mean,
                      const Tensor& invstd, bool training, const Tensor& averages, DType dtype) {
  const int64_t channels = x.size(1);
  const std::vector<A> inverse = read_channels<A>(op, "invstd", invstd, channels, 0);
  const Columns<A> columns = columns_of<A>({read_channels<A>(op, "mean", mean, channels, 0),
                                            inverse,
                                            read_channels<A>(op, "weight", weight, channels, 1),
                                            {}});
  STD_TORCH_CHECK(
      averages.is_cpu() && averages.dim() == 2 && averages.size(0) == 2 &&
          averages.size(1) == channels && dtype_code(averages) == arithmetic_dtype_code<A>(),
      op, ": averages must have two values per channel, in the dtype of arithmetic, got ",
      to_string(averages.sizes()));
  std::vector<A> mean_dy(channels), slope(channels);
  const A* average = static_cast<const A*>(averages.const_data_ptr());
  for (int64_t c = 0; c < channels; ++c) {
    const double s = inverse[c];
    mean_dy[c] = average[c * averages.stride(1)];
    slope[c] = static_cast<A>(average[averages.stride(0) + c * averages.stride(1)] * s * s);
  }
  Tensor grad_x = allocate_like(x);
  const int64_t size = static_cast<int64_t>(x.element_size());
  const std::array activations{images.pooled(grad_out.const_data_ptr(), nullptr, size),
                               images.whole(x.const_data_ptr(), nullptr, size),
                               images.pooled(argmax.const_data_ptr(), nullptr, 1),
                               images.whole(nullptr, grad_x.mutable_data_ptr(), size)};
  const auto kernel = kernels().max_pool_gradients[dtype][training];
  const int64_t height = images.rows.size;
  images.for_each_part(
      height, images.grain(height, images.columns.size), activations,
      [&](int64_t, int64_t channel, const Pooling& pool, const auto& pointers, int64_t begin,
          int64_t end) {
        const MaxPoolGradientArgs args{
            pointers[0], pointers[1],         static_cast<const uint8_t*>(pointers[2]),
            pointers[3], columns.at(channel), {mean_dy.data() + channel, slope.data() + channel}};
        kernel(pool, args, begin, end);
      });
  return grad_x;
}

Tensor bn_relu_max_pool_backward_apply_cpu(const Tensor& grad_out, const Tensor& x,
                                           const Tensor& argmax, const OptionalTensor& weight,
                                           const Tensor& mean, const Tensor& invstd, bool training,
                                           const Tensor& averages, const Ints& kernel_size,
                                           const Ints& stride, const Ints& padding) {
  const char* op = "bn_relu_max_pool_backward_apply";
  check_4d(op, "x", x);
  const DType dtype = dtype_of(op, "x", x);
  const Images images(op, x, kernel_size, stride, padding);
  check_backward(op, images, grad_out, x, argmax);
  const auto run = [&](auto arithmetic) {
    return backward_apply<decltype(arithmetic)>(op, images, grad_out, x, argmax, weight, mean,
                                                invstd, training, averages, dtype);
  };
  return dtype == kFloat64 ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_native, CPU, m) {
  m.impl("bn_relu_max_pool", TORCH_BOX(&resnet_fused::cpu::bn_relu_max_pool_cpu));
  m.impl("bn_relu_max_pool_backward_sums",
         TORCH_BOX(&resnet_fused::cpu::bn_relu_max_pool_backward_sums_cpu));
  m.impl("bn_relu_max_pool_backward_apply",
         TORCH_BOX(&resnet_fused::cpu::bn_relu_max_pool_backward_apply_cpu));
}
