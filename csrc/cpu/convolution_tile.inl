// The inner loops of convolutions: one tile of output pixels times 32 output channels held in
// registers, and the transforms of Winograd's algorithm around it. Included by kernels.inl on
// instruction sets with 32 registers.

// acc += a . b, where a is one word (a float, or two bfloat16) and b has one for each lane.
template <class T>
RESNET_FUSED_INLINE __m512 dot(__m512 acc, const char* a, __m512 b);

template <>
__attribute__((always_inline)) inline __m512 dot<float>(__m512 acc, const char* a, __m512 b) {
  return _mm512_fmadd_ps(_mm512_set1_ps(load_raw<float>(a)), b, acc);
}

#if defined(RESNET_FUSED_AVX512BF16)
template <>
__attribute__((always_inline)) inline __m512 dot<BFloat16>(__m512 acc, const char* a, __m512 b) {
  const __m512i word = _mm512_set1_epi32(load_raw<int32_t>(a));
  return _mm512_dpbf16_ps(acc, (__m512bh)word, (__m512bh)_mm512_castps_si512(b));
}
#endif

// Weights are asked for so many bytes ahead, across the ends of pages.
constexpr int64_t kAhead = 6144;

// 2 * kPixels accumulators, two registers of weights and one of x: 31 of 32 for 14 pixels. A word
// of x is used twice and one of weights kPixels times, so that neither is waited for.
template <class T, int kPixels>
void convolution_tile(ConvolutionTile t) {
  constexpr int64_t kWord = 4, kRegister = 64;
  constexpr int64_t kLaneBytes = kLanes<T> * sizeof(T);
  __m512 acc[kPixels][2];
#pragma GCC unroll 14
  for (int i = 0; i < kPixels; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
  if (t.last) {
    // What the epilogue touches arrives while the product is computed.
#pragma GCC unroll 14
    for (int i = 0; i < kPixels; ++i) {
      __builtin_prefetch(t.out + i * t.out_stride, 1);
      __builtin_prefetch(t.out + i * t.out_stride + kLaneBytes, 1);
    }
  }
  const int64_t stride = t.x_stride, stride2 = 2 * stride;
  const char* weight = t.weight;
  for (int64_t row = 0; row < t.rows; ++row) {
    // Every third pixel has a pointer of its own: 14 would not fit the registers.
    const char* x = t.x + row * t.row_stride;
    const char* third[5] = {x, x + 3 * stride, x + 6 * stride, x + 9 * stride, x + 12 * stride};
    const char* const end = weight + t.words * 2 * kRegister;
    for (; weight != end; weight += 2 * kRegister) {
      const __m512 w0 = load_raw<__m512>(weight), w1 = load_raw<__m512>(weight + kRegister);
      __builtin_prefetch(weight + kAhead);
      __builtin_prefetch(weight + kAhead + kRegister);
#pragma GCC unroll 14
      for (int i = 0; i < kPixels; ++i) {
        const int64_t offset = i % 3 == 0 ? 0 : i % 3 == 1 ? stride : stride2;
        acc[i][0] = dot<T>(acc[i][0], third[i / 3] + offset, w0);
        acc[i][1] = dot<T>(acc[i][1], third[i / 3] + offset, w1);
      }
#pragma GCC unroll 5
      for (int i = 0; i < 5; ++i) third[i] += kWord;
    }
  }
  const float* begin = t.first ? t.shift : t.sums;
  const int64_t begin_stride = t.first ? 0 : kTileChannels;
#pragma GCC unroll 14
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      acc[i][half] = _mm512_add_ps(
          acc[i][half], _mm512_loadu_ps(begin + i * begin_stride + half * kLanes<float>));
    }
  }
  if (!t.last) {
#pragma GCC unroll 14
    for (int i = 0; i < kPixels; ++i) {
      _mm512_storeu_ps(t.sums + i * kTileChannels, acc[i][0]);
      _mm512_storeu_ps(t.sums + i * kTileChannels + kLanes<float>, acc[i][1]);
    }
    return;
  }
  const __m512 floor = _mm512_set1_ps(t.floor);
#pragma GCC unroll 14
  for (int i = 0; i < kPixels; ++i) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m512 v = acc[i][half];
      if (t.residual) {
        const char* residual = t.residual + i * t.residual_stride + half * kLaneBytes;
        v = _mm512_add_ps(v, (__m512)load(reinterpret_cast<const T*>(residual)));
      }
      // NaN stays, as in relu().
      v = _mm512_max_ps(floor, v);
      store(reinterpret_cast<T*>(t.out + i * t.out_stride + half * kLaneBytes), (FloatVec)v);
    }
  }
}

// Four values to B^T d: (d0 - d2, d1 + d2, d2 - d1, d1 - d3).
RESNET_FUSED_INLINE void winograd_differences(const FloatVec (&d)[4], FloatVec (&out)[4]) {
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

void winograd_input(WinogradInput t) {
  for (int64_t c = 0; c < t.channels; c += kLanes<float>) {
    FloatVec columns[4][4];  // [column][row]
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      FloatVec d[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        const char* pixel = t.x + y * t.row_stride + x * t.pixel_stride;
        d[y] = load(reinterpret_cast<const float*>(pixel) + c);
      }
      winograd_differences(d, columns[x]);
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      const FloatVec row[4] = {columns[0][y], columns[1][y], columns[2][y], columns[3][y]};
      FloatVec v[4];
      winograd_differences(row, v);
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) {
        store(reinterpret_cast<float*>(t.transformed + (4 * y + x) * t.position) + c, v[x]);
      }
    }
  }
}

// Four values to A^T m: (m0 + m1 + m2, m1 - m2 - m3).
RESNET_FUSED_INLINE void winograd_sums(const FloatVec (&m)[4], FloatVec (&out)[2]) {
  out[0] = m[0] + m[1] + m[2];
  out[1] = m[1] - m[2] - m[3];
}

void winograd_output(WinogradOutput t) {
  const FloatVec floor = FloatVec{} + t.floor;
  for (int64_t c = 0; c < kTileChannels; c += kLanes<float>) {
    FloatVec columns[4][2];  // [column][row]
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      FloatVec m[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        m[y] = load(reinterpret_cast<const float*>(t.transformed + (4 * y + x) * t.position) + c);
      }
      winograd_sums(m, columns[x]);
    }
    const FloatVec shift = load(t.shift + c);
#pragma GCC unroll 2
    for (int y = 0; y < 2; ++y) {
      const FloatVec row[4] = {columns[0][y], columns[1][y], columns[2][y], columns[3][y]};
      FloatVec pixels[2];
      winograd_sums(row, pixels);
#pragma GCC unroll 2
      for (int x = 0; x < 2; ++x) {
        FloatVec v = pixels[x] + shift;
        if (t.residual) {
          const char* residual =
              t.residual + y * t.residual_row_stride + x * t.residual_pixel_stride;
          v += load(reinterpret_cast<const float*>(residual) + c);
        }
        v = (FloatVec)_mm512_max_ps((__m512)floor, (__m512)v);  // NaN stays
        char* out = t.out + y * t.out_row_stride + x * t.out_pixel_stride;
        store(reinterpret_cast<float*>(out) + c, v);
      }
    }
  }
}

template <class T, int kPixels>
constexpr void add_convolution_tiles(Kernels& k, DType dtype) {
  k.convolution_tile[dtype][kPixels] = convolution_tile<T, kPixels>;
  if constexpr (kPixels > 1) add_convolution_tiles<T, kPixels - 1>(k, dtype);
}
