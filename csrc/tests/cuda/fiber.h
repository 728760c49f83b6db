// Switching from one stack to another.
#pragma once

#include "block.h"

namespace dlvae::emulator {

// With a stack of its own, for the life of the process.
Fiber* new_fiber();
// The next switch to it calls `main`, which never returns.
void prepare_fiber(Fiber* fiber, void (*main)());
// First of all in `main`.
void enter_fiber();
// Goes on with `to`; returns when someone switches back. ends: nobody will.
void switch_fibers(Fiber* from, Fiber* to, bool ends);

}  // namespace dlvae::emulator
