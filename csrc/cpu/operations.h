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

std::tuple<Tensor, Tensor> kept_softmax_fwd(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& indices);
std::tuple<Tensor, Tensor, Tensor> kept_softmax_bwd(
    const Tensor& grad, const Tensor& values, const Tensor& sums, const Tensor& x, const Tensor& weight,
    std::optional<Tensor> bias, const Tensor& indices, bool need_x, bool need_weight, bool need_bias);

}  // namespace dlvae
