// Switching from one stack to another.
#pragma once

#include "block.h"

namespace dlvae::emulator {

// Creates a fiber with a stack of its own, which lives as long as the process.
Fiber* new_fiber();
// Makes the next switch to the fiber call `main`, which must not return.
void prepare_fiber(Fiber* fiber, void (*main)());
// Must be the first call in `main`.
void enter_fiber();
// Continues with `to`; returns when another fiber switches back. ends: no fiber will switch back.
void switch_fibers(Fiber* from, Fiber* to, bool ends);

}  // namespace dlvae::emulator
