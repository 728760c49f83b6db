// The operations of the compiled libraries. Each library implements them for its device, in one file per operation.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "tensors.h"

namespace dlvae {

using Tensors2 = std::tuple<Tensor, Tensor>;
using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using OptionalTensor = std::optional<Tensor>;

// The table of operations: OPERATION(name, result type, parameters, schema). Arguments and results are those of the
// operation of the same name in dlvae_kernels/ops.py. Only `uncertain_rows`, which is for tests, is not in that table:
// it returns the number of rows that `nearest_code` searches a second time because rounding might have hidden the
// nearest code.
#define DLVAE_OPERATIONS(OPERATION) \
  OPERATION(uncertain_rows, int64_t, (const Tensor& x, const Tensor& codebook), "(Tensor x, Tensor codebook) -> int") \
  OPERATION( \
      nearest_code, Tensors2, (const Tensor& x, const Tensor& codebook, bool return_distance, std::string precision), \
      "(Tensor x, Tensor codebook, bool return_distance, str precision) -> (Tensor, Tensor)") \
  OPERATION( \
      topk_codes, Tensors2, \
      (const Tensor& x, const Tensor& dictionary, int64_t k, std::string metric, OptionalTensor bias), \
      "(Tensor x, Tensor dictionary, int k, str metric, Tensor? bias) -> (Tensor, Tensor)") \
  OPERATION( \
      one_hot, Tensor, (const Tensor& indices, int64_t num_codes, ScalarType dtype), \
      "(Tensor indices, int num_codes, ScalarType dtype) -> Tensor") \
  OPERATION( \
      gather_codes_fwd, Tensor, (const Tensor& codebook, const Tensor& indices), \
      "(Tensor codebook, Tensor indices) -> Tensor") \
  OPERATION( \
      gather_codes_bwd, Tensor, (const Tensor& grad, const Tensor& indices, int64_t num_codes, int64_t num_heads), \
      "(Tensor grad, Tensor indices, int num_codes, int num_heads) -> Tensor") \
  OPERATION( \
      vector_quantize_fwd, Tensors6, \
      (const Tensor& x, const Tensor& codebook, bool need_error, std::string precision, OptionalTensor mask), \
      "(Tensor x, Tensor codebook, bool need_error, str precision, Tensor? mask)" \
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)") \
  OPERATION( \
      vector_quantize_bwd, Tensors2, \
      (const Tensor& grad_quantized, const Tensor& grad_codebook_loss, const Tensor& grad_commitment_loss, \
       const Tensor& half_error, const Tensor& indices, int64_t num_codes, int64_t num_heads, bool need_x, \
       bool need_codebook), \
      "(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss, Tensor half_error," \
      " Tensor indices, int num_codes, int num_heads, bool need_x, bool need_codebook) -> (Tensor, Tensor)") \
  OPERATION( \
      rotation_trick_bwd, Tensor, (const Tensor& grad, const Tensor& x, const Tensor& q), \
      "(Tensor grad, Tensor x, Tensor q) -> Tensor") \
  OPERATION( \
      ema_statistics, Tensor, (const Tensor& x, const Tensor& indices, int64_t num_codes, int64_t num_heads), \
      "(Tensor x, Tensor indices, int num_codes, int num_heads) -> Tensor") \
  OPERATION( \
      ema_step, void, \
      (const Tensor& codebook, const Tensor& cluster_size, const Tensor& embed_sum, const Tensor& statistics, \
       double decay, double epsilon), \
      "(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum, Tensor statistics, float decay," \
      " float epsilon) -> ()") \
  OPERATION( \
      residual_quantize_fwd, Tensors5, \
      (const Tensor& x, const Tensor& codebooks, OptionalTensor levels, OptionalTensor mask, std::string precision, \
       std::string gradient), \
      "(Tensor x, Tensor codebooks, Tensor? levels, Tensor? mask, str precision, str gradient)" \
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)") \
  OPERATION( \
      residual_quantize_bwd, Tensors2, \
      (const Tensor& grad_quantized, const Tensor& grad_codebook_loss, const Tensor& grad_commitment_loss, \
       const Tensor& x, const Tensor& indices, const Tensor& codebooks, std::string gradient, bool need_x, \
       bool need_codebooks), \
      "(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss, Tensor x, Tensor indices," \
      " Tensor codebooks, str gradient, bool need_x, bool need_codebooks) -> (Tensor, Tensor)") \
  OPERATION( \
      residual_statistics, Tensor, (const Tensor& x, const Tensor& indices, const Tensor& codebooks), \
      "(Tensor x, Tensor indices, Tensor codebooks) -> Tensor") \
  OPERATION( \
      sparse_decode_fwd, Tensor, (const Tensor& values, const Tensor& indices, const Tensor& dictionary), \
      "(Tensor values, Tensor indices, Tensor dictionary) -> Tensor") \
  OPERATION( \
      sparse_decode_bwd, Tensors2, \
      (const Tensor& grad, const Tensor& values, const Tensor& indices, const Tensor& dictionary, bool need_values, \
       bool need_dictionary), \
      "(Tensor grad, Tensor values, Tensor indices, Tensor dictionary, bool need_values, bool need_dictionary)" \
      " -> (Tensor, Tensor)") \
  OPERATION( \
      kept_softmax_fwd, Tensors2, (const Tensor& x, const Tensor& weight, OptionalTensor bias, const Tensor& indices), \
      "(Tensor x, Tensor weight, Tensor? bias, Tensor indices) -> (Tensor, Tensor)") \
  OPERATION( \
      kept_softmax_bwd, Tensors3, \
      (const Tensor& grad, const Tensor& values, const Tensor& sums, const Tensor& x, const Tensor& weight, \
       OptionalTensor bias, const Tensor& indices, bool need_x, bool need_weight, bool need_bias), \
      "(Tensor grad, Tensor values, Tensor sums, Tensor x, Tensor weight, Tensor? bias, Tensor indices, bool need_x," \
      " bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)") \
  OPERATION( \
      code_entropy_fwd, Tensors3, (const Tensor& x, const Tensor& codebook, double temperature, OptionalTensor mask), \
      "(Tensor x, Tensor codebook, float temperature, Tensor? mask) -> (Tensor, Tensor, Tensor)") \
  OPERATION( \
      code_entropy_bwd, Tensors2, \
      (const Tensor& grad_entropies, const Tensor& grad_mean_probabilities, const Tensor& x, const Tensor& codebook, \
       const Tensor& sums, const Tensor& entropies, double temperature, OptionalTensor mask, bool need_x, \
       bool need_codebook), \
      "(Tensor grad_entropies, Tensor grad_mean_probabilities, Tensor x, Tensor codebook, Tensor sums," \
      " Tensor entropies, float temperature, Tensor? mask, bool need_x, bool need_codebook) -> (Tensor, Tensor)")

#define DLVAE_DECLARE(name, result, parameters, schema) result name parameters;
DLVAE_OPERATIONS(DLVAE_DECLARE)
#undef DLVAE_DECLARE

// Defines the schema of each operation in the namespace of a library.
inline void define_operations(torch::stable::detail::StableLibrary& m) {
#define DLVAE_DEFINE(name, result, parameters, schema) m.def(#name schema);
  DLVAE_OPERATIONS(DLVAE_DEFINE)
#undef DLVAE_DEFINE
}

// Registers the function that implements each operation, for the dispatch key of a library.
inline void implement_operations(torch::stable::detail::StableLibrary& m) {
#define DLVAE_IMPLEMENT(name, result, parameters, schema) m.impl(#name, TORCH_BOX(&name));
  DLVAE_OPERATIONS(DLVAE_IMPLEMENT)
#undef DLVAE_IMPLEMENT
}

}  // namespace dlvae
