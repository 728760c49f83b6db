// CUDA's language for a C++ compiler, by which the kernels of csrc/cuda run on the CPU: device.cuh includes it where
// DLVAE_EMULATE_CUDA is defined.
//
// Blocks run one after another. The threads of a block are fibers: where one waits for others, at a barrier or in an
// operation of its warp, the next one that can goes on; the first to start is the lowest and the highest in turns.
// DLVAE_EMULATED_ORDER=<seed> shuffles blocks, and draws the thread that goes on from all that can. What no GPU says is said here: a barrier that not all threads reach, a copy that nobody waited for, shared memory that
// nobody wrote. `make cuda-emulated SANITIZE=1` sees accesses out of bounds besides, in Python with libasan.so and
// libstdc++.so preloaded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "half.h"
#include "intrinsics.h"
#include "ptx_emulated.h"
#include "vectors.h"
#include "warp.h"
