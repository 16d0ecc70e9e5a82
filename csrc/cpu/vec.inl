// One register of float or double, and its loads and stores from every element type. Included by
// kernels.inl inside an instruction set's namespace. Uses no standard library: an inline function
// from there, compiled for this instruction set, might be the copy that the linker keeps for all.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#define RESNET_FUSED_VECTOR(bytes) __attribute__((vector_size(bytes)))
typedef float FloatVec RESNET_FUSED_VECTOR(RESNET_FUSED_VECTOR_BYTES);
typedef double DoubleVec RESNET_FUSED_VECTOR(RESNET_FUSED_VECTOR_BYTES);
typedef int32_t IntVec RESNET_FUSED_VECTOR(RESNET_FUSED_VECTOR_BYTES);
typedef uint32_t BitsVec RESNET_FUSED_VECTOR(RESNET_FUSED_VECTOR_BYTES);
typedef float HalfFloatVec RESNET_FUSED_VECTOR(RESNET_FUSED_VECTOR_BYTES / 2);
typedef uint16_t HalfBitsVec RESNET_FUSED_VECTOR(RESNET_FUSED_VECTOR_BYTES / 2);
typedef int64_t LongVec RESNET_FUSED_VECTOR(RESNET_FUSED_VECTOR_BYTES);
// As many bytes as there are floats or doubles in a register.
typedef uint8_t FloatBytes RESNET_FUSED_VECTOR(RESNET_FUSED_VECTOR_BYTES / 4);
typedef uint8_t DoubleBytes RESNET_FUSED_VECTOR(RESNET_FUSED_VECTOR_BYTES / 8);

#define RESNET_FUSED_INLINE static inline __attribute__((always_inline))
#define RESNET_FUSED_INLINE_BODY __attribute__((always_inline))

// Vec is the register that elements of T are computed in, Scalar its element.
template <class T>
struct Element {
  using Scalar = float;
  using Vec = FloatVec;
  using Index = IntVec;  // an integer for each lane, as comparisons give it
  using Bytes = FloatBytes;
  // The largest positive value that rounds to zero in T, so that a sign taken before rounding
  // agrees with one taken after.
  static constexpr float kRoundsToZero = 0.0f;
};
template <>
struct Element<double> {
  using Scalar = double;
  using Vec = DoubleVec;
  using Index = LongVec;
  using Bytes = DoubleBytes;
  static constexpr double kRoundsToZero = 0.0;
};
template <>
struct Element<Float16> : Element<float> {
  static constexpr float kRoundsToZero = 0x1p-25f;
};
template <>
struct Element<BFloat16> : Element<float> {
#if defined(RESNET_FUSED_AVX512BF16)
  static constexpr float kRoundsToZero = 0x1.fffffcp-127f;
#else
  static constexpr float kRoundsToZero = 0x1p-134f;
#endif
};

template <class T>
constexpr int kLanes = sizeof(typename Element<T>::Vec) / sizeof(typename Element<T>::Scalar);

template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<BFloat16> = true;

template <class To, class From>
RESNET_FUSED_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V, class P>
RESNET_FUSED_INLINE V load_raw(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class V, class P>
RESNET_FUSED_INLINE void store_raw(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

RESNET_FUSED_INLINE BitsVec widen_bits(HalfBitsVec h) {
#if defined(RESNET_FUSED_AVX512)
  return (BitsVec)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(RESNET_FUSED_AVX2)
  return (BitsVec)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, BitsVec);
#endif
}

// Keeps the low 16 bits of each lane; the high ones must be zero.
RESNET_FUSED_INLINE HalfBitsVec narrow_bits(BitsVec v) {
#if defined(RESNET_FUSED_AVX512)
  return (HalfBitsVec)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(RESNET_FUSED_AVX2)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (HalfBitsVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, HalfBitsVec);
#endif
}

RESNET_FUSED_INLINE IntVec widen(FloatBytes v) {
#if defined(RESNET_FUSED_AVX512)
  return (IntVec)_mm512_cvtepu8_epi32((__m128i)v);
#elif defined(RESNET_FUSED_AVX2)
  return (IntVec)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(v)));
#else
  return __builtin_convertvector(v, IntVec);
#endif
}
RESNET_FUSED_INLINE LongVec widen(DoubleBytes v) { return __builtin_convertvector(v, LongVec); }

// Keeps the low byte of each lane.
RESNET_FUSED_INLINE FloatBytes to_bytes(IntVec v) {
#if defined(RESNET_FUSED_AVX512)
  return (FloatBytes)_mm512_cvtepi32_epi8((__m512i)v);
#else
  return __builtin_convertvector(v, FloatBytes);
#endif
}
RESNET_FUSED_INLINE DoubleBytes to_bytes(LongVec v) {
  return __builtin_convertvector(v, DoubleBytes);
}

RESNET_FUSED_INLINE FloatVec load(const float* p) { return load_raw<FloatVec>(p); }
RESNET_FUSED_INLINE DoubleVec load(const double* p) { return load_raw<DoubleVec>(p); }
RESNET_FUSED_INLINE void store(float* p, FloatVec v) { store_raw(p, v); }
RESNET_FUSED_INLINE void store(double* p, DoubleVec v) { store_raw(p, v); }

RESNET_FUSED_INLINE FloatVec load(const BFloat16* p) {
  return bit_cast<FloatVec>(widen_bits(load_raw<HalfBitsVec>(p)) << 16);
}

#if defined(RESNET_FUSED_AVX512BF16)
// To nearest even; subnormal numbers become zero.
RESNET_FUSED_INLINE void store(BFloat16* p, FloatVec v) {
  store_raw(p, _mm512_cvtneps_pbh((__m512)v));
}
#else
// To nearest even; every NaN becomes the quiet one.
RESNET_FUSED_INLINE void store(BFloat16* p, FloatVec v) {
  const BitsVec bits = bit_cast<BitsVec>(v);
  const BitsVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const BitsVec nan = BitsVec{} + 0x7fc0;
  store_raw(p, narrow_bits(v == v ? rounded : nan));
}
#endif

#if defined(RESNET_FUSED_AVX512)
RESNET_FUSED_INLINE FloatVec load(const Float16* p) {
  return (FloatVec)_mm512_cvtph_ps(load_raw<__m256i>(p));
}
RESNET_FUSED_INLINE void store(Float16* p, FloatVec v) {
  store_raw(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(RESNET_FUSED_AVX2)
RESNET_FUSED_INLINE FloatVec load(const Float16* p) {
  return (FloatVec)_mm256_cvtph_ps(load_raw<__m128i>(p));
}
RESNET_FUSED_INLINE void store(Float16* p, FloatVec v) {
  store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
RESNET_FUSED_INLINE FloatVec load(const Float16* p) {
  const BitsVec half = widen_bits(load_raw<HalfBitsVec>(p));
  const BitsVec sign = (half & 0x8000) << 16;
  const BitsVec magnitude = (half & 0x7fff) << 13;
  // The product puts the exponent right and normalises subnormal numbers.
  const BitsVec finite = bit_cast<BitsVec>(bit_cast<FloatVec>(magnitude) * 0x1p112f);
  const BitsVec special = magnitude | 0x7f800000;
  const BitsVec is_special = (BitsVec)(magnitude >= 0x7c00u << 13);
  return bit_cast<FloatVec>(sign | (special & is_special) | (finite & ~is_special));
}

RESNET_FUSED_INLINE void store(Float16* p, FloatVec v) {
  const BitsVec bits = bit_cast<BitsVec>(v);
  const BitsVec sign = bits & 0x80000000u;
  const BitsVec magnitude = bits ^ sign;
  const BitsVec normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Adding 0.5 rounds to the spacing of subnormal halves, 2^-24.
  const FloatVec shifted = bit_cast<FloatVec>(magnitude) + 0.5f;
  const BitsVec subnormal = bit_cast<BitsVec>(shifted) - 0x3f000000u;
  const BitsVec infinity = BitsVec{} + 0x7c00;
  const BitsVec nan = BitsVec{} + 0x7e00;
  BitsVec half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? infinity : half;
  half = magnitude > 0x7f800000u ? nan : half;
  store_raw(p, narrow_bits(half | (sign >> 16)));
}
#endif

// How many elements of a register are meant: a number, or this, known at compile time.
struct AllLanes {};

template <class T>
RESNET_FUSED_INLINE auto load(const T* p, AllLanes) {
  return load(p);
}

// The lanes beyond n are zero.
template <class T>
RESNET_FUSED_INLINE auto load(const T* p, int64_t n) {
  T buffer[kLanes<T>] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
RESNET_FUSED_INLINE void store(T* p, typename Element<T>::Vec v, AllLanes) {
  store(p, v);
}

template <class T>
RESNET_FUSED_INLINE void store(T* p, typename Element<T>::Vec v, int64_t n) {
  T buffer[kLanes<T>];
  store(buffer, v);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

// NaN stays: of unordered operands, x86's max returns the second.
#if defined(RESNET_FUSED_AVX512)
RESNET_FUSED_INLINE FloatVec relu(FloatVec v) {
  return (FloatVec)_mm512_max_ps(_mm512_setzero_ps(), (__m512)v);
}
RESNET_FUSED_INLINE DoubleVec relu(DoubleVec v) {
  return (DoubleVec)_mm512_max_pd(_mm512_setzero_pd(), (__m512d)v);
}
#else
template <class V>
RESNET_FUSED_INLINE V relu(V v) {
  return v < 0 ? V{} : v;
}
#endif

// v with its 12 leading bits; enough for a guess.
RESNET_FUSED_INLINE FloatVec shorten(FloatVec v) {
  return bit_cast<FloatVec>(bit_cast<BitsVec>(v) & 0xfffff000u);
}
RESNET_FUSED_INLINE DoubleVec shorten(DoubleVec v) { return v; }

// A vector of Scalar as doubles, in kParts<Vec> registers.
template <class V>
constexpr int kParts = 2;
template <>
constexpr int kParts<DoubleVec> = 1;
constexpr int kDoubleLanes = kLanes<double>;

RESNET_FUSED_INLINE DoubleVec to_double(DoubleVec v, int) { return v; }

RESNET_FUSED_INLINE DoubleVec to_double(FloatVec v, int part) {
#if defined(RESNET_FUSED_AVX512)
  const __m256 half =
      part ? _mm512_extractf32x8_ps((__m512)v, 1) : _mm512_castps512_ps256((__m512)v);
  return (DoubleVec)_mm512_cvtps_pd(half);
#elif defined(RESNET_FUSED_AVX2)
  const __m128 half =
      part ? _mm256_extractf128_ps((__m256)v, 1) : _mm256_castps256_ps128((__m256)v);
  return (DoubleVec)_mm256_cvtps_pd(half);
#else
  HalfFloatVec half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + part * sizeof(half), sizeof(half));
  return __builtin_convertvector(half, DoubleVec);
#endif
}

// sums[i] += v[i], where v is one part of a wider register of which n lanes are meant.
RESNET_FUSED_INLINE void add_part(double* sums, DoubleVec v, int part, AllLanes) {
  double* p = sums + part * kDoubleLanes;
  store(p, load(p) + v);
}

RESNET_FUSED_INLINE void add_part(double* sums, DoubleVec v, int part, int64_t n) {
  const int64_t left = n - part * kDoubleLanes;
  if (left <= 0) return;
  double* p = sums + part * kDoubleLanes;
  const int64_t lanes = left < kDoubleLanes ? left : kDoubleLanes;
  store(p, load(p, lanes) + v, lanes);
}

template <class V, class N>
RESNET_FUSED_INLINE void add(double* sums, V v, N n) {
  for (int part = 0; part < kParts<V>; ++part) add_part(sums, to_double(v, part), part, n);
}

#undef RESNET_FUSED_VECTOR
