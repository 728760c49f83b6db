// All kernels, and the table of those that this translation unit compiles.
#pragma once

#include "../kernels.h"
#include "rows.h"
#include "topk.h"

namespace {

dlvae::Kernels make_table(const char* name) {
  dlvae::Kernels table{};
  table.name = name;
  table.panel = PANEL;
  table.load_rows = load_rows;
  table.store_rows = store_rows;
  table.square_codes = square_codes;
  table.pack_topk = pack_topk;
  table.topk_rows = topk_rows;
  return table;
}

}  // namespace
