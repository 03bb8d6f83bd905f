// What the excitation is made of. The formulas are in formulas.inc.
#pragma once

namespace scse {

// Of the hidden layer; the codes of scse_kernels.ops.ACTIVATION.
enum class Activation { relu, leaky_relu, silu, gelu, gelu_tanh, elu, none };

// Of both branches; the codes of scse_kernels.ops.GATE.
enum class Gate { sigmoid, hard_sigmoid };

}  // namespace scse
