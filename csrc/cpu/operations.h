// The operations on the CPU, a file each; arguments and results are those of dlvae:: in ops.py.
#pragma once

#include "tensors.h"

namespace dlvae {

std::string cpu_name();

}  // namespace dlvae
