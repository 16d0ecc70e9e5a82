// The dynamic shared memory of a launch, and the asynchronous copies to it.
//
// It is watched in pieces of 2 bytes, but where accesses of 16 bytes follow each other, a whole
// line of 16 bytes goes as one piece.
#pragma once

#include "emulator/emulator.h"

namespace resnet_fused::emulator {

// To be called before the first block of a launch.
void prepare_shared_memory(size_t bytes);

// To be called by a thread at its end. All its copies must have landed.
void check_copies_landed();

// Each defined by the scheduler.
[[noreturn]] void fail_shared_alignment(const char* what, uint32_t address, size_t bytes,
                                        Site site);
[[noreturn]] void fail_shared_range(const char* what, uint32_t offset, size_t bytes, Site site);
[[noreturn]] void fail_end_with_copies(Site site);

}  // namespace resnet_fused::emulator
