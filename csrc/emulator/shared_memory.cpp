// Called for every access to dynamic shared memory.
#include "emulator/shared_memory.h"

#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <vector>

#include "cuda/ptx.cuh"

namespace resnet_fused::emulator {
namespace {

constexpr uint32_t kLineBytes = 16;
constexpr uint32_t kCellsPerLine = kLineBytes / kDynamicCellBytes;
constexpr uint32_t kAlignment = ptx::kSharedAlignment;

struct alignas(kAlignment) AlignedBytes {
  std::byte bytes[kAlignment];
};

struct Line {
  Cell cell;
  bool is_split = false;  // what is known stands in the line's cells instead
};

// The copies that a thread has started and not waited for.
struct Copies {
  // Lines, and kEndOfGroup after the last one of each group.
  std::vector<uint32_t> queue;
  int groups = 0;
};
constexpr uint32_t kEndOfGroup = UINT32_MAX;

std::vector<AlignedBytes> storage;
std::vector<Cell> cells;
std::vector<Line> lines;
bool never_merge = false;
std::array<Copies, kMaxThreads> copies;

SharedAccess access_to(uint32_t offset, Site site) {
  return {nullptr, static_cast<int>(offset), site};
}

void split(uint32_t line) {
  if (lines[line].is_split) return;
  lines[line].is_split = true;
  std::fill_n(&cells[line * kCellsPerLine], kCellsPerLine, lines[line].cell);
}

// Calls visit(cell, offset) for each piece of a line.
template <class Visit>
inline void for_each_piece(uint32_t line, Visit visit) {
  if (!lines[line].is_split) [[likely]] {
    visit(lines[line].cell, line * kLineBytes);
    return;
  }
  for (uint32_t i = 0; i < kCellsPerLine; ++i) {
    visit(cells[line * kCellsPerLine + i], line * kLineBytes + i * kDynamicCellBytes);
  }
}

// The same for each cell of a part of a line.
template <class Visit>
inline void for_each_cell(uint32_t offset, size_t bytes, Visit visit) {
  split(offset / kLineBytes);
  for (uint32_t at = offset; at < offset + bytes; at += kDynamicCellBytes) {
    visit(cells[at / kDynamicCellBytes], at);
  }
}

void check_line_write(uint32_t line, Site site) {
  for_each_piece(
      line, [site](Cell& cell, uint32_t offset) { check_write(cell, access_to(offset, site)); });
  if (lines[line].is_split && !never_merge) {
    lines[line].is_split = false;
    lines[line].cell = Cell();
    lines[line].cell.writer = stamp(site);
  }
}

uint32_t check_address(const char* what, uint32_t address, size_t bytes, Site site) {
  if (address % bytes != 0) [[unlikely]] {
    fail_shared_alignment(what, address, bytes, site);
  }
  const uint32_t offset = address - kDynamicSharedAddress;
  if (offset >= dynamic_memory.size || dynamic_memory.size - offset < bytes) [[unlikely]] {
    fail_shared_range(what, offset, bytes, site);
  }
  return offset;
}

}  // namespace

void prepare_shared_memory(size_t bytes) {
  const size_t blocks = (bytes + kAlignment - 1) / kAlignment;
  if (storage.size() < blocks) {
    storage.resize(blocks);
    lines.resize(blocks * kAlignment / kLineBytes);
    cells.resize(blocks * kAlignment / kDynamicCellBytes);
  }
  dynamic_memory = {storage.empty() ? nullptr : storage[0].bytes, cells.data(), bytes};
  never_merge = false;
  // After an error, copies may be left over.
  for (Copies& of_thread : copies) {
    for (const uint32_t line : of_thread.queue) {
      if (line == kEndOfGroup) continue;
      for_each_piece(line, [](Cell& cell, uint32_t) { cell.is_in_flight = false; });
    }
    of_thread.queue.clear();
    of_thread.groups = 0;
  }
}

void watch_cells() {
  if (never_merge) return;
  never_merge = true;
  for (uint32_t line = 0; line * kLineBytes < dynamic_memory.size; ++line) split(line);
}

void read_shared(void* value, uint32_t from, size_t bytes, Site site) {
  const uint32_t offset = check_address("load", from, bytes, site);
  const auto check = [site](Cell& cell, uint32_t at) { check_read(cell, access_to(at, site)); };
  if (bytes == kLineBytes) {
    for_each_piece(offset / kLineBytes, check);
  } else {
    for_each_cell(offset, bytes, check);
  }
  std::memcpy(value, dynamic_memory.bytes + offset, bytes);
}

void write_shared(uint32_t to, const void* value, size_t bytes, Site site) {
  const uint32_t offset = check_address("store", to, bytes, site);
  if (bytes == kLineBytes) {
    check_line_write(offset / kLineBytes, site);
  } else {
    for_each_cell(offset, bytes,
                  [site](Cell& cell, uint32_t at) { check_write(cell, access_to(at, site)); });
  }
  std::memcpy(dynamic_memory.bytes + offset, value, bytes);
}

void start_copy(uint32_t to, const void* from, bool exists, Site site) {
  const uint32_t offset = check_address("cp.async", to, kLineBytes, site);
  const uint32_t line = offset / kLineBytes;
  check_line_write(line, site);
  for_each_piece(line, [](Cell& cell, uint32_t) { cell.is_in_flight = true; });
  copies[current_thread].queue.push_back(line);
  // Nobody can look before the copy lands.
  std::byte* const bytes = dynamic_memory.bytes + offset;
  if (!exists) {
    std::memset(bytes, 0, kLineBytes);
    return;
  }
  if (reinterpret_cast<uintptr_t>(from) % kLineBytes != 0) [[unlikely]] {
    fail_alignment("cp.async", from, kLineBytes, site);
  }
  ++counters.accesses[std::countr_zero(kLineBytes)];
  counters.bytes_read += kLineBytes;
  on_load(from, kLineBytes, site);
  std::memcpy(bytes, from, kLineBytes);
}

void commit_copies() {
  Copies& own = copies[current_thread];
  own.queue.push_back(kEndOfGroup);
  ++own.groups;
}

void wait_for_copies(int pending) {
  Copies& own = copies[current_thread];
  auto next = own.queue.begin();
  for (; own.groups > pending; ++next) {
    if (*next == kEndOfGroup) {
      --own.groups;
      continue;
    }
    for_each_piece(*next, [](Cell& cell, uint32_t) {
      cell.is_in_flight = false;
      cell.writer = stamp(cell.writer.site);
    });
  }
  own.queue.erase(own.queue.begin(), next);
}

void check_copies_landed() {
  Copies& own = copies[current_thread];
  if (own.queue.empty()) [[likely]] {
    return;
  }
  for (const uint32_t line : own.queue) {
    if (line == kEndOfGroup) continue;
    for_each_piece(line, [](Cell& cell, uint32_t) { fail_end_with_copies(cell.writer.site); });
  }
  own.queue.clear();
  own.groups = 0;
}

}  // namespace resnet_fused::emulator
