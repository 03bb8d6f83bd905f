// As much of CUDA as the headers of csrc/cuda need that hold plain functions.
#pragma once

#define __host__
#define __device__
typedef struct CUstream_st* cudaStream_t;
