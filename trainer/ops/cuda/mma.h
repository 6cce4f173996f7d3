/* mma: tensor cores' instructions, and how their factors get to registers; for kernels that multiply on them.
 *
 * One instruction multiplies 16 x 16 by 16 x 8, bf16 factors, f32 sums. Lane l = 4 g + t holds of the first factor rows
 * g and g + 8, columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9; of the second one column g and these as rows; of the result rows
 * g and g + 8, columns 2 t and 2 t + 1 (PTX ISA, mma.m16n8k16). */
#ifndef TESSERA_TRAINER_OPS_CUDA_MMA_H
#define TESSERA_TRAINER_OPS_CUDA_MMA_H

#include "trainer/ops/cuda/gpu.h"

struct first_factor {
    unsigned v[4];
};

/* c += a b */
static __device__ inline void mma(float (&c)[4], const struct first_factor &a, unsigned b0, unsigned b1)
{
#ifdef CUDA_EMULATED
    emu_mma(c, a.v, b0, b1);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
#endif
}

/* Four matrices of 8 x 8 from shared memory, the lane's part of matrix i to v[i]; `row`: of lane l, row l % 8 of matrix
 * l / 8, 16 bytes at a multiple of them. TRANS: the matrices' transposes. */
template <bool TRANS> static __device__ inline void load_matrices(unsigned (&v)[4], const void *row)
{
#ifdef CUDA_EMULATED
    emu_ldmatrix(v, row, TRANS);
#else
    unsigned at = (unsigned)__cvta_generic_to_shared(row);
    if (TRANS)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(at)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                     : "r"(at)
                     : "memory");
#endif
}

/* Begin to copy SIZE bytes to shared memory, past the registers; both at multiples of SIZE: 16, past the first cache
 * too, or 4. Only `bytes` are read, the others become 0. */
template <int SIZE = 16> static __device__ inline void copy_async(void *shared, const void *from, int bytes)
{
#ifdef CUDA_EMULATED
    emu_copy_async(shared, from, SIZE, (unsigned)bytes);
#else
    unsigned at = (unsigned)__cvta_generic_to_shared(shared);
    if (SIZE == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
#endif
}

/* What was begun since the last call is a group, none if nothing was. */
static __device__ inline void copy_commit(void)
{
#ifdef CUDA_EMULATED
    emu_copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Until this thread's groups but the last LEFT are there; others see them behind a barrier. */
template <int LEFT> static __device__ inline void copy_wait(void)
{
#ifdef CUDA_EMULATED
    emu_copy_wait(LEFT);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

#endif
