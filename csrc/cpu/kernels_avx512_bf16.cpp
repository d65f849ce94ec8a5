// The kernels for x86-64 processors with AVX-512 and its conversion to bfloat16: the kernels with a bfloat16 in them.
#define LDM_FUSED_ISA avx512_bf16
#define LDM_FUSED_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define LDM_FUSED_VECTOR_BYTES 64
#define LDM_FUSED_AVX512_BF16

#include "cpu/kernels_x86.inl"
