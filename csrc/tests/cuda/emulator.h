// CUDA for a C++ compiler: the kernels of csrc/cuda run on the CPU. device.cuh includes this header if
// DLVAE_EMULATE_CUDA is defined.
//
// Blocks run one after another. The threads of a block are fibers: if one waits at a barrier or in an operation of its
// warp, the next one that can continues. The first thread to start alternates between the lowest and the highest.
// DLVAE_EMULATED_ORDER=<seed> shuffles blocks, and picks the next thread at random. The emulator reports errors that no
// GPU reports: a barrier that not all threads reach, a copy that nobody waited for, shared memory that nobody wrote.
// `make cuda-emulated SANITIZE=1` also detects accesses out of bounds, in Python with libasan.so and libstdc++.so
// preloaded.
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
