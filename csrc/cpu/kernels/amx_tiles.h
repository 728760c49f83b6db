// Products on the matrix tiles of AMX. DLVAE_EMULATE_TILES replaces them by plain code, for tests on any machine.
#pragma once

#include "simd.h"

namespace {

constexpr int TILE_ROWS = 16;   // rows of x, or steps of codes
constexpr int TILE_STEPS = 16;  // words in a row

#if defined(DLVAE_EMULATE_TILES)

struct Tile {
  uint32_t words[16][16];
};

DLVAE_INLINE void begin_tiles() {}
DLVAE_INLINE void end_tiles() {}

inline void load_tile(Tile& tile, const void* from, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(tile.words[i], (const char*)from + i * stride, 64);
}
inline void store_tile(const Tile& tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy((char*)to + i * stride, tile.words[i], 64);
}
inline void multiply_tiles(Tile& sums, const Tile& x, const Tile& codes) {
  const auto part = [](uint32_t bits) { return load<float>(&bits); };
  for (int r = 0; r < 16; ++r)
    for (int s = 0; s < 16; ++s)
      for (int k = 0; k < 16; ++k) {
        const uint32_t a = x.words[r][s], b = codes.words[s][k];
        const float products = part(a & 0xffff0000) * part(b & 0xffff0000) + part(a << 16) * part(b << 16);
        const float sum = part(sums.words[r][k]) + products;
        memcpy(&sums.words[r][k], &sum, 4);
      }
}

// Computes scores[r][.] of 32 rows and the 32 codes of a panel.
inline void tile_scores(
    const float* start, const uint32_t* x, int64_t ld, const uint32_t* panel, int64_t steps, float* scores) {
  for (int i = 0; i < 2; ++i)
    for (int v = 0; v < 2; ++v) {
      Tile sums, rows, codes;
      load_tile(sums, start + v * WIDTH, 0);
      for (int64_t s = 0; s < steps; s += TILE_STEPS) {
        load_tile(rows, x + i * TILE_ROWS * ld + s, ld * 4);
        load_tile(codes, panel + s * PANEL + v * WIDTH, PANEL * 4);
        multiply_tiles(sums, rows, codes);
      }
      store_tile(sums, scores + i * TILE_ROWS * PANEL + v * WIDTH, PANEL * 4);
    }
}

#else

// Configures eight tiles of 16 rows of 64 bytes. The configuration belongs to the thread.
DLVAE_INLINE void begin_tiles() {
  struct __attribute__((packed)) {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } configuration = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  _tile_loadconfig(&configuration);
}
DLVAE_INLINE void end_tiles() { _tile_release(); }

// Computes scores[r][.] of 32 rows and the 32 codes of a panel.
DLVAE_INLINE void tile_scores(
    const float* start, const uint32_t* x, int64_t ld, const uint32_t* panel, int64_t steps, float* scores) {
  // A stride of zero loads the starts of the codes into each row.
  _tile_loadd(0, start, 0);
  _tile_loadd(1, start + WIDTH, 0);
  _tile_loadd(2, start, 0);
  _tile_loadd(3, start + WIDTH, 0);
  for (int64_t s = 0; s < steps; s += TILE_STEPS) {
    _tile_loadd(4, x + s, ld * 4);
    _tile_loadd(6, panel + s * PANEL, PANEL * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + s * PANEL + WIDTH, PANEL * 4);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + TILE_ROWS * ld + s, ld * 4);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, PANEL * 4);
  _tile_stored(1, scores + WIDTH, PANEL * 4);
  _tile_stored(2, scores + TILE_ROWS * PANEL, PANEL * 4);
  _tile_stored(3, scores + TILE_ROWS * PANEL + WIDTH, PANEL * 4);
}

#endif

}  // namespace
