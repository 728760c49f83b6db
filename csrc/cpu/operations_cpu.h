// The operations on the CPU, and queries about the CPU library.
#pragma once

#include <string>

#include "../operations.h"
#include "tensors_cpu.h"

namespace dlvae {

// Return the instruction set in use; and the instruction sets that the library has kernels for or, unless `all`, those
// that this processor supports, the fastest first.
std::string cpu_name();
std::string cpu_names(bool all);

// Measures the products of two features per second when all threads compute scores in the arithmetic of the search: an
// upper bound of the rate of any search.
double search_rate();

}  // namespace dlvae
