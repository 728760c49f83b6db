// The operations that schemas.h defines, a file each; arguments and results are those of dlvae:: in ops.py. Each
// library has functions of its own by these names, for its device.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "tensors.h"

namespace dlvae {

// How many rows `nearest_code` searches a second time, since rounding might have hidden the nearest code: for tests.
int64_t uncertain_rows(const Tensor& x, const Tensor& codebook);

std::tuple<Tensor, Tensor> nearest_code(
    const Tensor& x, const Tensor& codebook, bool return_distance, std::string precision);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vector_quantize_fwd(
    const Tensor& x, const Tensor& codebook, bool need_error, std::string precision);
std::tuple<Tensor, Tensor> vector_quantize_bwd(
    const Tensor& grad_quantized, const Tensor& grad_codebook_loss, const Tensor& grad_commitment_loss,
    const Tensor& half_error, const Tensor& indices, int64_t num_codes, bool need_x, bool need_codebook);

Tensor one_hot(const Tensor& indices, int64_t num_codes, ScalarType dtype);

Tensor gather_codes_fwd(const Tensor& codebook, const Tensor& indices);
Tensor gather_codes_bwd(const Tensor& grad, const Tensor& indices, int64_t num_codes);

Tensor ema_statistics(const Tensor& x, const Tensor& indices, int64_t num_codes);
void ema_step(
    const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_sum, const Tensor& statistics, double decay,
    double epsilon);

Tensor sparse_decode_fwd(const Tensor& values, const Tensor& indices, const Tensor& dictionary);
std::tuple<Tensor, Tensor> sparse_decode_bwd(
    const Tensor& grad, const Tensor& values, const Tensor& indices, const Tensor& dictionary, bool need_values,
    bool need_dictionary);

std::tuple<Tensor, Tensor> topk_codes(
    const Tensor& x, const Tensor& dictionary, int64_t k, std::string metric, std::optional<Tensor> bias);

std::tuple<Tensor, Tensor> kept_softmax_fwd(
    const Tensor& x, const Tensor& weight, std::optional<Tensor> bias, const Tensor& indices);
std::tuple<Tensor, Tensor, Tensor> kept_softmax_bwd(
    const Tensor& grad, const Tensor& values, const Tensor& sums, const Tensor& x, const Tensor& weight,
    std::optional<Tensor> bias, const Tensor& indices, bool need_x, bool need_weight, bool need_bias);

inline void implement_operations(torch::stable::detail::StableLibrary& m) {
  m.impl("nearest_code", TORCH_BOX(&nearest_code));
  m.impl("uncertain_rows", TORCH_BOX(&uncertain_rows));
  m.impl("topk_codes", TORCH_BOX(&topk_codes));
  m.impl("one_hot", TORCH_BOX(&one_hot));
  m.impl("gather_codes_fwd", TORCH_BOX(&gather_codes_fwd));
  m.impl("gather_codes_bwd", TORCH_BOX(&gather_codes_bwd));
  m.impl("vector_quantize_fwd", TORCH_BOX(&vector_quantize_fwd));
  m.impl("vector_quantize_bwd", TORCH_BOX(&vector_quantize_bwd));
  m.impl("ema_statistics", TORCH_BOX(&ema_statistics));
  m.impl("ema_step", TORCH_BOX(&ema_step));
  m.impl("sparse_decode_fwd", TORCH_BOX(&sparse_decode_fwd));
  m.impl("sparse_decode_bwd", TORCH_BOX(&sparse_decode_bwd));
  m.impl("kept_softmax_fwd", TORCH_BOX(&kept_softmax_fwd));
  m.impl("kept_softmax_bwd", TORCH_BOX(&kept_softmax_bwd));
}

}  // namespace dlvae
