// What one call of BatchNorm + ReLU + scSE works on: scSE's problem, whose x is BatchNorm's input u
// and whose dx is du, and what BatchNorm needs besides. The mathematics stand in
// scse_kernels/batch_norm/reference.py.
#pragma once

#include "../problem.h"

namespace scse {

template <typename T>
struct NormProblem : Problem<T> {
  using A = Accumulator<T>;

  bool of_batch;  // the statistics are those of u, not running ones
  double eps;
  const A *weight, *bias;   // [C]; null: 1 and 0
  A *mean, *var;            // [C]: written by the forward where they are of_batch
  A *scale, *shift, *rstd;  // [C]: v = scale * (u - mean) + shift

  // Forward: [N, strips, C], a strip's own mean and its sum of squares of what deviates from it.
  A *strip_mean, *strip_squares;

  // Backward: [N, strips, C], sums over a strip's positions where v > 0: of g (see the reference),
  // of g * (u - mean), of ones, and of (u - mean).
  A *sum_g, *sum_gu, *sum_one, *sum_u;
  A *du_one, *du_u;  // [C]: du = scale * dv + du_one + du_u * (u - mean)
  A *dweight, *dbias;
  bool need_affine;  // need_dx: du is wanted

  // Whether sums of dv are wanted.
  bool need_sums() const { return (this->need_dx && of_batch) || need_affine; }
};

template <typename T>
struct NormKernels {
  void (*forward)(const NormProblem<T>&);
  void (*backward)(const NormProblem<T>&);
};

}  // namespace scse
