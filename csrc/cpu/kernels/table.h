// All kernels, and the table of those that this translation unit compiles.
#pragma once

#include "../kernels.h"
#include "quantize.h"
#include "rows.h"
#include "search.h"

namespace {

dlvae::Kernels make_table(const char* name) {
  dlvae::Kernels table{};
  table.name = name;
  table.panel = PANEL;
  table.load_rows = load_rows;
  table.store_rows = store_rows;
  table.packed_steps = packed_steps;
  table.measure_codes = measure_codes;
  table.pack_panels = pack_panels;
  table.search_rows = search_rows;
  table.quantize_rows = quantize_rows;
  return table;
}

}  // namespace
