/* both: marks functions that C and the kernels of a GPU compile alike. They keep to what C and C++ share. */
#ifndef TESSERA_COMM_BASE_BOTH_H
#define TESSERA_COMM_BASE_BOTH_H

#ifdef __CUDACC__
#define BOTH static __host__ __device__ inline
#else
#define BOTH static inline
#endif

#endif
