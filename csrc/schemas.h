// The schemas of the operations, one for each dlvae:: operation of ops.py, in whatever namespace a library has them.
#pragma once

#include <torch/csrc/stable/library.h>

namespace dlvae {

inline void define_operations(torch::stable::detail::StableLibrary& m) {
  m.def("uncertain_rows(Tensor x, Tensor codebook) -> int");
  m.def("nearest_code(Tensor x, Tensor codebook, bool return_distance, str precision) -> (Tensor, Tensor)");
  m.def(
      "vector_quantize_fwd(Tensor x, Tensor codebook, bool need_error, str precision)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("one_hot(Tensor indices, int num_codes, ScalarType dtype) -> Tensor");
  m.def("gather_codes_fwd(Tensor codebook, Tensor indices) -> Tensor");
  m.def("gather_codes_bwd(Tensor grad, Tensor indices, int num_codes) -> Tensor");
  m.def(
      "vector_quantize_bwd(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss, Tensor"
      " half_error, Tensor indices, int num_codes, bool need_x, bool need_codebook) -> (Tensor, Tensor)");
  m.def("ema_statistics(Tensor x, Tensor indices, int num_codes) -> Tensor");
  m.def(
      "ema_step(Tensor(a!) codebook, Tensor(b!) cluster_size, Tensor(c!) embed_sum, Tensor statistics, float decay,"
      " float epsilon) -> ()");
  m.def("sparse_decode_fwd(Tensor values, Tensor indices, Tensor dictionary) -> Tensor");
  m.def(
      "sparse_decode_bwd(Tensor grad, Tensor values, Tensor indices, Tensor dictionary, bool need_values,"
      " bool need_dictionary) -> (Tensor, Tensor)");
  m.def("topk_codes(Tensor x, Tensor dictionary, int k, str metric, Tensor? bias) -> (Tensor, Tensor)");
  m.def("kept_softmax_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor indices) -> (Tensor, Tensor)");
  m.def(
      "kept_softmax_bwd(Tensor grad, Tensor values, Tensor sums, Tensor x, Tensor weight, Tensor? bias, Tensor indices,"
      " bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
}

}  // namespace dlvae
