// All kernels, and the table of those that this translation unit compiles.
#pragma once

#include "../kernels.h"
#include "rows.h"
#include "softmax.h"
#include "topk.h"

namespace {

dlvae::Kernels make_table(const char* name) {
  dlvae::Kernels table{};
  table.name = name;
  table.panel = PANEL;
  table.rows = ROWS;
  table.load_rows = load_rows;
  table.store_rows = store_rows;
  table.square_codes = square_codes;
  table.pack_topk = pack_topk;
  table.topk_rows = topk_rows;
  table.pack_weight = pack_weight;
  table.pack_weight_columns = pack_weight_columns;
  table.kept_softmax_rows = kept_softmax_rows;
  table.kept_softmax_grad_rows = kept_softmax_grad_rows;
  table.kept_softmax_grad_codes = kept_softmax_grad_codes;
  table.unpack_weight = unpack_weight;
  return table;
}

}  // namespace
