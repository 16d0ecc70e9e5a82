// What warps do with the tensor cores: matrices from shared memory to fragments, and products.
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
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

constexpr int kTileRows = 16;
constexpr int kTileColumns = 8;
constexpr int kWordsDeep = 8;  // of each row of a, and of each column of b

// The operands of a warp and a row of its sums, as matrices.
struct Operands {
  std::vector<float> a;    // [row][k]
  std::vector<float> b;    // [k][column]
  std::vector<float> sum;  // [column]
};
Operands operands;

template <class Type>
void widen_operands(const Product* const* products, int rows, int columns) {
  constexpr int kDepth = kWordsDeep * Type::kNumbers;
  constexpr int kHalf = kDepth / 2;
  const size_t pitch = size_t{kTileColumns} * columns;
  operands.a.resize(std::max(operands.a.size(), size_t{kTileRows} * rows * kDepth));
  operands.b.resize(std::max(operands.b.size(), kDepth * pitch));
  operands.sum.resize(std::max(operands.sum.size(), pitch));
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Product& product = *products[lane];
    const int group = lane / 4;
    const int first = lane % 4 * Type::kNumbers;
    for (int i = 0; i < rows; ++i) {
      for (int part = 0; part < 4; ++part) {
        const int row = kTileRows * i + group + part % 2 * 8;
        Type::widen(product.a[4 * i + part], &operands.a[row * kDepth + first + part / 2 * kHalf]);
      }
    }
    float numbers[Type::kNumbers];
    for (int j = 0; j < columns; ++j) {
      for (int part = 0; part < 2; ++part) {
        Type::widen(product.b[2 * j + part], numbers);
        float* to = &operands.b[(first + part * kHalf) * pitch + kTileColumns * j + group];
        for (int n = 0; n < Type::kNumbers; ++n) to[n * pitch] = numbers[n];
      }
    }
  }
}

using Columns = float __attribute__((vector_size(sizeof(float) * kTileColumns)));

// sum[column] += a[k] * b[k][column] in order of k, over `tiles` tiles of columns.
__attribute__((target_clones("avx2", "default"))) void multiply_add_row(float* sum, const float* a,
                                                                        const float* b, int tiles,
                                                                        int depth) {
  for (int j = 0; j < tiles; ++j) {
    Columns total;
    std::memcpy(&total, sum + kTileColumns * j, sizeof(total));
    for (int k = 0; k < depth; ++k) {
      Columns b_of_k;
      std::memcpy(&b_of_k, b + kTileColumns * (k * tiles + j), sizeof(b_of_k));
      total += a[k] * b_of_k;
    }
    std::memcpy(sum + kTileColumns * j, &total, sizeof(total));
  }
}

template <class Type>
void multiply_add(void* const* arguments) {
  constexpr int kDepth = kWordsDeep * Type::kNumbers;
  const auto* const* const products = reinterpret_cast<const Product* const*>(arguments);
  const int rows = products[0]->rows, columns = products[0]->columns;
  widen_operands<Type>(products, rows, columns);
  for (int row = 0; row < kTileRows * rows; ++row) {
    // Of each tile four lanes have two neighbouring numbers of the row.
    const auto for_each_pair = [&](auto visit) {
      const int first = 4 * (row / kTileRows * columns) + row / 8 % 2 * 2;
      for (int lane = 0; lane < 4; ++lane) {
        float* const own = products[row % 8 * 4 + lane]->sum + first;
        float* const of_row = &operands.sum[2 * lane];
        for (int j = 0; j < columns; ++j) visit(own + 4 * j, of_row + kTileColumns * j);
      }
    };
    for_each_pair([](const float* own, float* of_row) { std::copy_n(own, 2, of_row); });
    multiply_add_row(operands.sum.data(), &operands.a[row * kDepth], operands.b.data(), columns,
                     kDepth);
    for_each_pair([](float* own, const float* of_row) { std::copy_n(of_row, 2, own); });
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
