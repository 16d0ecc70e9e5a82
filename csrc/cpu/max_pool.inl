// The inner loops of bn_relu_max_pool, in registers of channels: max pooling with batch norm and
// ReLU in front of it, and its backward. Included by kernels.inl.

template <class T>
using Index = typename Element<T>::Index;

template <class T>
RESNET_FUSED_INLINE Index<T> in_every_lane(int64_t value) {
  const Index<T> zero{};
  return zero + static_cast<decltype(+zero[0])>(value);
}

template <class T>
RESNET_FUSED_INLINE Index<T> load_bytes(const uint8_t* p, AllLanes) {
  return widen(load_raw<typename Element<T>::Bytes>(p));
}

template <class T>
RESNET_FUSED_INLINE Index<T> load_bytes(const uint8_t* p, int64_t n) {
  uint8_t buffer[kLanes<T>] = {};
  __builtin_memcpy(buffer, p, n);
  return load_bytes<T>(buffer, AllLanes{});
}

template <class T>
RESNET_FUSED_INLINE void store_bytes(uint8_t* p, Index<T> v, AllLanes) {
  store_raw(p, to_bytes(v));
}

template <class T>
RESNET_FUSED_INLINE void store_bytes(uint8_t* p, Index<T> v, int64_t n) {
  uint8_t buffer[kLanes<T>];
  store_bytes<T>(buffer, v, AllLanes{});
  __builtin_memcpy(p, buffer, n);
}

// The taps [begin, end) of a window that lie inside of an image.
struct Taps {
  int64_t first, begin, end;  // `first`: where tap 0 is, perhaps in front of the image

  __attribute__((always_inline)) Taps(const PoolingAxis& axis, int64_t window)
      : first(window * axis.stride - axis.padding),
        begin(first < 0 ? -first : 0),
        end(axis.size - first < axis.kernel ? axis.size - first : axis.kernel) {}
};

// The windows [begin, end) that contain a position, for positions that come one after the other.
struct Windows {
  const PoolingAxis& axis;
  int64_t begin = 0, end = 0;

  __attribute__((always_inline)) void move_to(int64_t position) {
    const int64_t padded = position + axis.padding;
    while (begin < axis.out_size && begin * axis.stride + axis.kernel <= padded) ++begin;
    while (end < axis.out_size && end * axis.stride <= padded) ++end;
  }
  __attribute__((always_inline)) int64_t tap(int64_t position, int64_t window) const {
    return position + axis.padding - window * axis.stride;
  }
};

template <class T>
void max_pool_kernel(Pooling pool, MaxPoolArgs args, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(args.x);
  T* out = static_cast<T*>(args.out);
  for (int64_t p = begin; p < end; ++p) {
    const Taps rows(pool.rows, p);
    for (int64_t q = 0; q < pool.columns.out_size; ++q) {
      const Taps columns(pool.columns, q);
      const int64_t place = (p * pool.columns.out_size + q) * pool.pixel;
      const auto body = [&](int64_t c, auto n) RESNET_FUSED_INLINE_BODY {
        const auto bn = load_affine<T>(args.bn, c, n);
        Vec<T> highest{};
        Index<T> argmax = in_every_lane<T>(kClosed);
        for (int64_t r = rows.begin; r < rows.end; ++r) {
          const T* row =
              x + ((rows.first + r) * pool.columns.size + columns.first) * pool.pixel + c;
          for (int64_t s = columns.begin; s < columns.end; ++s) {
            const Vec<T> v = bn(load(row + s * pool.pixel, n));
            // NaN wins, and the last of several.
            const Index<T> wins = (v > highest) | (v != v);
            highest = wins ? v : highest;
            argmax = wins ? in_every_lane<T>(r * pool.columns.kernel + s) : argmax;
          }
        }
        store(out + place + c, highest, n);
        store_bytes<T>(args.argmax + place + c, argmax, n);
      };
      for_each_column<T>({1, pool.pixel, 0, pool.channels}, body);
    }
  }
}

template <class T>
void max_pool_sums_kernel(Pooling pool, MaxPoolSumsArgs args, int64_t begin, int64_t end) {
  const T* grad_out = static_cast<const T*>(args.grad_out);
  const T* x = static_cast<const T*>(args.x);
  const Matrix channels{1, pool.pixel, 0, pool.channels};
  const int64_t width = pool.columns.out_size;
  Sums<T> sum_dy, sum_dy_x;
  for (int64_t first = begin * width; first < end * width; first += kSumRows) {
    const int64_t last = first + kSumRows < end * width ? first + kSumRows : end * width;
    sum_dy.clear(pool.channels);
    sum_dy_x.clear(pool.channels);
    for (int64_t pixel = first; pixel < last; ++pixel) {
      const int64_t p = pixel / width, place = pixel * pool.pixel;
      const Taps rows(pool.rows, p), columns(pool.columns, pixel - p * width);
      for_each_column<T>(channels, [&](int64_t c, auto n) RESNET_FUSED_INLINE_BODY {
        const Vec<T> mean = load_channels<T>(args.mean, c, n);
        const Index<T> argmax = load_bytes<T>(args.argmax + place + c, n);
        Vec<T> chosen = mean;
        for (int64_t r = rows.begin; r < rows.end; ++r) {
          const T* row =
              x + ((rows.first + r) * pool.columns.size + columns.first) * pool.pixel + c;
          for (int64_t s = columns.begin; s < columns.end; ++s) {
            const Vec<T> v = load(row + s * pool.pixel, n);
            chosen = argmax == in_every_lane<T>(r * pool.columns.kernel + s) ? v : chosen;
          }
        }
        const Vec<T> g = load(grad_out + place + c, n);
        const Vec<T> dy = argmax == in_every_lane<T>(kClosed) ? Vec<T>{} : g;
        sum_dy.add(c, dy);
        sum_dy_x.add(c, dy * (chosen - mean));
      });
    }
    add_columns<T>(channels, args.sum_dy, sum_dy);
    add_columns<T>(channels, args.sum_dy_x, sum_dy_x);
  }
}

template <class T, bool kTraining>
void max_pool_gradients_kernel(Pooling pool, MaxPoolGradientArgs args, int64_t begin, int64_t end) {
  const T* grad_out = static_cast<const T*>(args.grad_out);
  const T* x = static_cast<const T*>(args.x);
  T* grad_x = static_cast<T*>(args.grad_x);
  Windows rows{pool.rows};
  for (int64_t h = begin; h < end; ++h) {
    rows.move_to(h);
    Windows columns{pool.columns};
    for (int64_t w = 0; w < pool.columns.size; ++w) {
      columns.move_to(w);
      const int64_t place = (h * pool.columns.size + w) * pool.pixel;
      const auto body = [&](int64_t c, auto n) RESNET_FUSED_INLINE_BODY {
        Vec<T> dy{};
        for (int64_t p = rows.begin; p < rows.end; ++p) {
          for (int64_t q = columns.begin; q < columns.end; ++q) {
            const int64_t i = (p * pool.columns.out_size + q) * pool.pixel + c;
            const int64_t tap = rows.tap(h, p) * pool.columns.kernel + columns.tap(w, q);
            const Index<T> argmax = load_bytes<T>(args.argmax + i, n);
            const Vec<T> g = load(grad_out + i, n);
            dy += argmax == in_every_lane<T>(tap) ? g : Vec<T>{};
          }
        }
        const auto projection = load_projection<T, kTraining>(args.bn, args.projection, c, n);
        Vec<T> x_i{};
        if constexpr (kTraining) x_i = load(x + place + c, n);
        store(grad_x + place + c, projection(dy, x_i), n);
      };
      for_each_column<T>({1, pool.pixel, 0, pool.channels}, body);
    }
  }
}
