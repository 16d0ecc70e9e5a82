// The emulator's half of cuda/ptx.cuh.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "emulator/emulator.h"

namespace resnet_fused::emulator {

// Not 0, so that a kernel cannot do without it, and as little aligned as a kernel may expect.
constexpr uint32_t kDynamicSharedAddress = ptx::kSharedAlignment;

void read_shared(void* value, uint32_t from, size_t bytes, Site site);
void write_shared(uint32_t to, const void* value, size_t bytes, Site site);
void start_copy(uint32_t to, const void* from, bool exists, Site site);
void commit_copies();
void wait_for_copies(int pending);

// A lane's part in each operation of a warp.
struct MatrixLoad {
  uint32_t* fragment;
  uint32_t row;
};

struct Product {
  float* sum;
  const uint32_t* a;
  const uint32_t* b;
  int rows;
  int columns;
};

void load_matrices(void* const* loads, Site site);
void load_transposed_matrices(void* const* loads, Site site);
void multiply_add_bfloat16(void* const* products, Site site);
void multiply_add_half(void* const* products, Site site);
void multiply_add_tf32(void* const* products, Site site);

}  // namespace resnet_fused::emulator

namespace resnet_fused::ptx {

inline SharedAddress dynamic_shared() { return emulator::kDynamicSharedAddress; }

template <int kBytes>
inline const void* offset(const void* base, int elements) {
  // Not pointer arithmetic: the address may lie outside of the array, where nothing is read.
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) +
                                       static_cast<uintptr_t>(int64_t{kBytes} * elements));
}

inline void prefetch(const void*) {}

template <class V>
inline V load_shared(SharedAddress from, emulator::Site site = emulator::Site::current()) {
  emulator::check_access_type<V>();
  static_assert(sizeof(V) >= 4);
  alignas(V) std::byte bytes[sizeof(V)];
  emulator::read_shared(bytes, from, sizeof(V), site);
  return std::bit_cast<V>(bytes);
}

template <class V>
inline void store_shared(SharedAddress to, V value,
                         emulator::Site site = emulator::Site::current()) {
  emulator::check_access_type<V>();
  static_assert(sizeof(V) >= 2);
  emulator::write_shared(to, &value, sizeof(V), site);
}

inline void copy_async(SharedAddress to, const void* from, bool exists,
                       emulator::Site site = emulator::Site::current()) {
  emulator::start_copy(to, from, exists, site);
}

inline void commit_copies() { emulator::commit_copies(); }

template <int kPending>
inline void wait_for_copies() {
  static_assert(kPending >= 0);
  emulator::wait_for_copies(kPending);
}

inline void load_matrices(uint32_t (&fragment)[4], SharedAddress row,
                          emulator::Site site = emulator::Site::current()) {
  emulator::MatrixLoad load{fragment, row};
  emulator::collective({.kind = emulator::Collective::kOperation,
                        .name = "load_matrices",
                        .site = site,
                        .operation = emulator::load_matrices,
                        .argument = &load});
}

inline void load_matrices_transposed(uint32_t (&fragment)[4], SharedAddress row,
                                     emulator::Site site = emulator::Site::current()) {
  emulator::MatrixLoad load{fragment, row};
  emulator::collective({.kind = emulator::Collective::kOperation,
                        .name = "load_matrices_transposed",
                        .site = site,
                        .operation = emulator::load_transposed_matrices,
                        .argument = &load});
}

template <class T, int kRows, int kColumns>
inline void multiply_add(float (&sum)[kRows][kColumns][4], const uint32_t (&a)[kRows][4],
                         const uint32_t (&b)[kColumns][2],
                         emulator::Site site = emulator::Site::current()) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half> || std::is_same_v<T, Tf32>);
  emulator::Product product{&sum[0][0][0], &a[0][0], &b[0][0], kRows, kColumns};
  emulator::collective({.kind = emulator::Collective::kOperation,
                        .name = "multiply_add",
                        .site = site,
                        .operation = std::is_same_v<T, BFloat16> ? emulator::multiply_add_bfloat16
                                     : std::is_same_v<T, Half>   ? emulator::multiply_add_half
                                                                 : emulator::multiply_add_tf32,
                        .argument = &product});
}

template <class T>
inline void multiply_add_tile(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              emulator::Site site = emulator::Site::current()) {
  multiply_add<T>(reinterpret_cast<float (&)[1][1][4]>(sum),
                  reinterpret_cast<const uint32_t (&)[1][4]>(a),
                  reinterpret_cast<const uint32_t (&)[1][2]>(b), site);
}

inline uint32_t round_to_tf32(float value) {
  constexpr uint32_t kDroppedBits = (1u << 13) - 1;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (std::isfinite(value) ? bits + (1u << 12) : bits) & ~kDroppedBits;
}

// One of the two numbers of pack().
template <class T>
inline uint32_t round_to_16_bits(float value) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
  if (std::isnan(value)) return 0x7fffu;
  if constexpr (std::is_same_v<T, Half>) return Half(value).x;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

template <class T>
inline uint32_t pack(float first, float second) {
  return round_to_16_bits<T>(first) | round_to_16_bits<T>(second) << 16;
}

template <class T>
inline float2 unpack(uint32_t packed) {
  static_assert(std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>);
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {std::bit_cast<float>(packed << 16), std::bit_cast<float>(packed & 0xffff0000u)};
  } else {
    const auto value = [](uint32_t bits) {
      const float wide = Half(static_cast<uint16_t>(bits), Half::from_bits());
      return std::isnan(wide) ? std::bit_cast<float>(0x7fffffffu) : wide;
    };
    return {value(packed), value(packed >> 16)};
  }
}

template <class T>
inline uint32_t pack_relu(float first, float second) {
  const auto relu = [](float value) { return value > 0 || std::isnan(value) ? value : 0.0f; };
  return pack<T>(relu(first), relu(second));
}

}  // namespace resnet_fused::ptx
