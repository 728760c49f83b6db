// The table of the kernels that this translation unit compiles.
#pragma once

#include "../kernels.h"
#include "elementwise.h"
#include "entropy_kernel.h"
#include "quantize.h"
#include "residual_kernel.h"
#include "rotation_kernel.h"
#include "rows_kernel.h"
#include "search_kernel.h"
#include "segment_sum_kernel.h"
#include "sparse_decode_kernel.h"
#include "softmax_kernel.h"
#include "topk_kernel.h"

namespace {

dlvae::Kernels make_table(const char* name) {
  dlvae::Kernels table{};
  table.name = name;
  table.panel = PANEL;
  table.rows = ROWS;
  table.load_rows = load_rows;
  table.store_rows = store_rows;
  table.search_few = search_few;
  table.packed_steps = packed_steps;
  table.measure_codes = measure_codes;
  table.pack_panels = pack_panels;
  table.search_rows = search_rows;
  table.repeat_scores = repeat_scores;
  table.quantize_rows = quantize_rows;
  table.quantize_residuals = quantize_residuals;
  table.subtract_codes = subtract_codes;
  table.residual_grad_rows = residual_grad_rows;
  table.sum_segments = sum_segments;
  table.decode_rows = decode_rows;
  table.atom_products = atom_products;
  table.copy_rows = copy_rows;
  table.ema_rows = ema_rows;
  table.subtract_scaled = subtract_scaled;
  table.rotate_rows = rotate_rows;
  table.topk_few = topk_few;
  table.pack_topk = pack_topk;
  table.topk_rows = topk_rows;
  table.pack_weight = pack_weight;
  table.pack_weight_columns = pack_weight_columns;
  table.kept_softmax_rows = kept_softmax_rows;
  table.kept_softmax_grad_rows = kept_softmax_grad_rows;
  table.kept_softmax_grad_codes = kept_softmax_grad_codes;
  table.unpack_weight = unpack_weight;
  table.code_entropy_rows = code_entropy_rows;
  table.code_entropy_grad_rows = code_entropy_grad_rows;
  return table;
}

}  // namespace
