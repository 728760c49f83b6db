// The operations on the CPU, a file each; arguments and results are those of dlvae:: in ops.py.
#pragma once

#include <string>
#include <tuple>

#include "tensors.h"

namespace dlvae {

// The instruction set in use; and all that there are kernels for, or those that this processor has, the best first.
std::string cpu_name();
std::string cpu_names(bool all);

// How many rows `nearest_code` searches a second time, since rounding might have hidden the nearest code: for tests.
int64_t uncertain_rows(const Tensor& x, const Tensor& codebook);

std::tuple<Tensor, Tensor> nearest_code(const Tensor& x, const Tensor& codebook, bool return_distance, std::string precision);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vector_quantize_fwd(
    const Tensor& x, const Tensor& codebook, bool need_error, std::string precision);

}  // namespace dlvae
