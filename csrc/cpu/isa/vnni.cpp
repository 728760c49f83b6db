// AVX-512 with VNNI: sums of 16-bit products.
#define ISA vnni
#define TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#define DLVAE_VNNI
#include "compile_table.h"
