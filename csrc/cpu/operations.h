// The operations on the CPU, a file each; arguments and results are those of dlvae:: in ops.py.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "tensors.h"

namespace dlvae {

std::string cpu_name();

std::tuple<Tensor, Tensor> topk_codes(
    const Tensor& x, const Tensor& dictionary, int64_t k, std::string metric, std::optional<Tensor> bias);

}  // namespace dlvae
