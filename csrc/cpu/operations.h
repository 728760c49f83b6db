// The operations on the CPU, a file each; arguments and results are those of dlvae:: in ops.py.
#pragma once

#include "tensors.h"

namespace dlvae {

// The instruction set in use; and all that there are kernels for, or those that this processor has, the best first.
std::string cpu_name();
std::string cpu_names(bool all);

}  // namespace dlvae
