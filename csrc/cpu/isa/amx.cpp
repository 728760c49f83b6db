// AVX-512 with matrix tiles (AMX) for bfloat16 products.
#define ISA amx
#define TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16"
#define DLVAE_AMX
#include "compile_table.h"
