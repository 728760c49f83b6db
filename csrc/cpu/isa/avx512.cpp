// The AVX-512 subsets that every server processor with AVX-512 has.
#define ISA avx512
#define TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
#define DLVAE_AVX512
#include "compile_table.h"
