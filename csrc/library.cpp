// The private operations dlvae_native::, one for each dlvae:: operation that the compiled kernels can run.
#include <torch/csrc/stable/library.h>

#include "cpu/operations.h"

STABLE_TORCH_LIBRARY(dlvae_native, m) {
  m.def("cpu_name() -> str");
  m.def("cpu_names(bool all) -> str");
  m.def("nearest_code(Tensor x, Tensor codebook, bool return_distance, str precision) -> (Tensor, Tensor)");
  m.def("search_rate() -> float");
  m.def("uncertain_rows(Tensor x, Tensor codebook) -> int");
  m.def(
      "vector_quantize_fwd(Tensor x, Tensor codebook, bool need_error, str precision)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("one_hot(Tensor indices, int num_codes, ScalarType dtype) -> Tensor");
  m.def("gather_codes_fwd(Tensor codebook, Tensor indices) -> Tensor");
  m.def("gather_codes_bwd(Tensor grad, Tensor indices, int num_codes) -> Tensor");
  m.def(
      "vector_quantize_bwd(Tensor grad_quantized, Tensor grad_codebook_loss, Tensor grad_commitment_loss, Tensor error,"
      " Tensor indices, int num_codes, bool need_x, bool need_codebook) -> (Tensor, Tensor)");
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

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_name", TORCH_BOX(&dlvae::cpu_name));
  m.impl("cpu_names", TORCH_BOX(&dlvae::cpu_names));
  m.impl("search_rate", TORCH_BOX(&dlvae::search_rate));
}

STABLE_TORCH_LIBRARY_IMPL(dlvae_native, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&dlvae::nearest_code));
  m.impl("uncertain_rows", TORCH_BOX(&dlvae::uncertain_rows));
  m.impl("vector_quantize_fwd", TORCH_BOX(&dlvae::vector_quantize_fwd));
  m.impl("one_hot", TORCH_BOX(&dlvae::one_hot));
  m.impl("gather_codes_fwd", TORCH_BOX(&dlvae::gather_codes_fwd));
  m.impl("gather_codes_bwd", TORCH_BOX(&dlvae::gather_codes_bwd));
  m.impl("vector_quantize_bwd", TORCH_BOX(&dlvae::vector_quantize_bwd));
  m.impl("ema_statistics", TORCH_BOX(&dlvae::ema_statistics));
  m.impl("ema_step", TORCH_BOX(&dlvae::ema_step));
  m.impl("sparse_decode_fwd", TORCH_BOX(&dlvae::sparse_decode_fwd));
  m.impl("sparse_decode_bwd", TORCH_BOX(&dlvae::sparse_decode_bwd));
  m.impl("topk_codes", TORCH_BOX(&dlvae::topk_codes));
  m.impl("kept_softmax_fwd", TORCH_BOX(&dlvae::kept_softmax_fwd));
  m.impl("kept_softmax_bwd", TORCH_BOX(&dlvae::kept_softmax_bwd));
}
