// The operations on the CPU, and what they tell of themselves.
#pragma once

#include <string>

#include "../operations.h"
#include "tensors_cpu.h"

namespace dlvae {

// The instruction set in use; and all that there are kernels for, or those that this processor has, the best first.
std::string cpu_name();
std::string cpu_names(bool all);

// Products of two features a second, of scores in the arithmetic of the search on all threads: what no search exceeds.
double search_rate();

}  // namespace dlvae
