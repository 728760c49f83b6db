// All kernels, and the table of those that this translation unit compiles.
#pragma once

#include "../kernels.h"
#include "elementwise.h"
#include "quantize.h"
#include "rows.h"
#include "search.h"
#include "segment_sum.h"
#include "sparse_decode.h"

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
  table.sum_segments = sum_segments;
  table.decode_rows = decode_rows;
  table.atom_products = atom_products;
  table.ema_rows = ema_rows;
  table.subtract_scaled = subtract_scaled;
  return table;
}

}  // namespace
