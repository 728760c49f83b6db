// The compiler's default target: SSE2 on x86-64, NEON on 64-bit ARM.
#include "../kernels/table.h"

const dlvae::Kernels& dlvae::portable_kernels() {
  static const Kernels table = make_table("portable");
  return table;
}
