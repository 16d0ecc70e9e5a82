// What warps do with the tensor cores: matrices from shared memory to fragments, and products.
#pragma GCC optimize("O3")

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "cuda/ptx.cuh"

namespace resnet_fused::emulator {
namespace {

using torch::headeronly::Half;

constexpr int kMatrixRows = 8;
constexpr int kMatrices = 4;
constexpr int kRowBytes = 16;
constexpr int kRowWords = 4;

using Words = std::array<uint32_t, kRowWords>;

// How many more turns the rows of a matrix take than one: two different rows in the same banks
// cannot be read at once.
int count_conflicts(const MatrixLoad* const* rows) {
  constexpr uint32_t kBankGroups = 8;
  std::array<uint32_t, kMatrixRows> lines;
  unsigned groups = 0;
  for (int i = 0; i < kMatrixRows; ++i) {
    lines[i] = rows[i]->row / kRowBytes;
    groups |= 1u << lines[i] % kBankGroups;
  }
  if (groups == (1u << kBankGroups) - 1) return 0;
  std::sort(lines.begin(), lines.end());
  const auto end = std::unique(lines.begin(), lines.end());
  std::array<int, kBankGroups> turns{};
  for (auto line = lines.begin(); line != end; ++line) ++turns[*line % kBankGroups];
  return *std::max_element(turns.begin(), turns.end()) - 1;
}

// word(rows, i, j): word j of row i of what a matrix becomes.
template <class Word>
void load_all(void* const* arguments, Site site, Word word) {
  const auto* const* const loads = reinterpret_cast<const MatrixLoad* const*>(arguments);
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    std::array<Words, kMatrixRows> rows;
    for (Words& row : rows) {
      const MatrixLoad& load = *loads[current_thread % kWarpSize];
      read_shared(&row, load.row, kRowBytes, site);
      ++current_thread;
    }
    counters.bank_conflicts += count_conflicts(loads + matrix * kMatrixRows);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      loads[lane]->fragment[matrix] = word(rows, lane / kRowWords, lane % kRowWords);
    }
  }
}

struct Bfloat16Words {
  static constexpr int kNumbers = 2;
  static void widen(uint32_t word, float* numbers) {
    numbers[0] = std::bit_cast<float>(word << 16);
    numbers[1] = std::bit_cast<float>(word & 0xffff0000u);
  }
};

struct HalfWords {
  static constexpr int kNumbers = 2;
  static void widen(uint32_t word, float* numbers) {
    numbers[0] = Half(static_cast<uint16_t>(word), Half::from_bits());
    numbers[1] = Half(static_cast<uint16_t>(word >> 16), Half::from_bits());
  }
};

struct Tf32Words {
  static constexpr int kNumbers = 1;
  static void widen(uint32_t word, float* numbers) {
    constexpr uint32_t kSeenBits = ~((1u << 13) - 1);
    numbers[0] = std::bit_cast<float>(word & kSeenBits);
  }
};

constexpr int kWordsDeep = 8;  // of each row of a, and of each column of b

// The operands of a warp as its lanes multiply them, four numbers at a time like the sums of a
// tile: (a of one row, the same again, a of the row 8 further down, the same again) and (b of one
// column, b of the next, the same two again).
struct Operands {
  std::vector<float> a;  // [tile of rows][lane / 4][k][4]
  std::vector<float> b;  // [lane % 4][k][tile of columns][4]
};
Operands operands;

template <class Type>
void widen_operands(const Product* const* products, int rows, int columns) {
  constexpr int kDepth = kWordsDeep * Type::kNumbers;
  constexpr int kHalf = kDepth / 2;
  operands.a.resize(std::max<size_t>(operands.a.size(), size_t{4} * rows * 8 * kDepth));
  operands.b.resize(std::max<size_t>(operands.b.size(), size_t{4} * 4 * kDepth * columns));
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Product& product = *products[lane];
    const int group = lane / 4;
    const int first = lane % 4 * Type::kNumbers;
    float numbers[Type::kNumbers];
    for (int i = 0; i < rows; ++i) {
      for (int part = 0; part < 4; ++part) {
        Type::widen(product.a[4 * i + part], numbers);
        const int k = first + part / 2 * kHalf;
        float* to = &operands.a[4 * ((size_t{8} * i + group) * kDepth + k) + part % 2 * 2];
        for (int n = 0; n < Type::kNumbers; ++n) to[4 * n] = to[4 * n + 1] = numbers[n];
      }
    }
    for (int j = 0; j < columns; ++j) {
      for (int part = 0; part < 2; ++part) {
        Type::widen(product.b[2 * j + part], numbers);
        const int k = first + part * kHalf;
        float* to = &operands.b[4 * ((size_t{kDepth} * (group / 2) + k) * columns + j) + group % 2];
        for (int n = 0; n < Type::kNumbers; ++n) {
          to[4 * columns * n] = to[4 * columns * n + 2] = numbers[n];
        }
      }
    }
  }
}

// sum[i][j] += a[i][k] * b[k][j] in order of k, for all i < rows and j < columns.
typedef float Quad __attribute__((vector_size(16), aligned(4)));

void multiply_add_quads(float* sum, const float* a, const float* b, int rows, int columns,
                        int depth) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) {
      Quad* const to = reinterpret_cast<Quad*>(sum + 4 * (i * columns + j));
      Quad total = *to;
      for (int k = 0; k < depth; ++k) {
        total += *reinterpret_cast<const Quad*>(a + 4 * (kMatrixRows * i * depth + k)) *
                 *reinterpret_cast<const Quad*>(b + 4 * (k * columns + j));
      }
      *to = total;
    }
  }
}

template <class Type>
void multiply_add(void* const* arguments) {
  const auto* const* const products = reinterpret_cast<const Product* const*>(arguments);
  const int rows = products[0]->rows, columns = products[0]->columns;
  constexpr int kDepth = kWordsDeep * Type::kNumbers;
  widen_operands<Type>(products, rows, columns);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    multiply_add_quads(products[lane]->sum, &operands.a[size_t{4} * (lane / 4) * kDepth],
                       &operands.b[size_t{4} * (lane % 4) * kDepth * columns], rows, columns,
                       kDepth);
  }
  counters.products += int64_t{rows} * columns;
}

}  // namespace

void load_matrices(void* const* loads, Site site) {
  load_all(loads, site, [](const auto& rows, int i, int j) { return rows[i][j]; });
}

void load_transposed_matrices(void* const* loads, Site site) {
  load_all(loads, site, [](const auto& rows, int i, int j) {
    const auto element = [&](int row) { return rows[row][i / 2] >> (i % 2 * 16) & 0xffffu; };
    return element(2 * j) | element(2 * j + 1) << 16;
  });
}

void multiply_add_bfloat16(void* const* products, Site) { multiply_add<Bfloat16Words>(products); }

void multiply_add_half(void* const* products, Site) { multiply_add<HalfWords>(products); }

void multiply_add_tf32(void* const* products, Site) { multiply_add<Tf32Words>(products); }

}  // namespace resnet_fused::emulator
