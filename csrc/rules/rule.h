// The contract of a rule: the mathematics of one optimizer, floats in, floats out.
//
// A rule is a struct with the members below; nothing in it knows a dtype, a device or a thread.
//
// kName: its name, by which Python asks for it.
//
// kStates, kStateCount: the per-parameter states in column order, under torch's names; the per-tensor ones
// come first, of them `step`. kStateCount says how many of the listed ones it has.
//
// Hyper, kHyper: the hyperparameters of a group, all doubles, and where each stands in a param group.
//
// needs: the norms that prepare reads (Need bits); 0 where it reads none.
//
// prepare: Hyper and the tensor's context to Scalars<T>, computed once a tensor, in double, rounded once to
// T; advances the per-tensor states, `tensor.state`.
//
// update: one element. Param and states in place, from the gradient and the Scalars.
//
// kHasDirection: a rule whose step length depends on the norm of its own direction (LAMB) has, instead of
// update, accumulate: the states from the gradient; direction: from the states as they were rounded at the
// store; and scale_direction: the Scalars' step_size, once the norms of direction and param are known.
//
// kKeepsDirection: of those, a rule whose direction Step.exchange changes between the passes (Muon). Its last
// state is the room for it, memory of the plan's and none of the parameter's states: accumulate writes it
// there, and direction receives what it has become in the place of the states. No norm is asked for, and
// prepare says the step_size.
//
// A root or a quotient that is NaN makes a result NaN: a device takes results that are not for sure (see
// cuda/quick_float.h). So what is computed from one does not vanish in a comparison.
//
// The mechanism around it (prepare.h) has applied maximize, the loss scale and clipping to the gradient
// already, and afterwards adds the coupled weight decay. The eager formula in
// fused_optim/optimizers/ and the Triton twin in kernels/rules/ hold the same lines in the same order.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FO_HOST_DEVICE __host__ __device__ __attribute__((always_inline))
#else
#define FO_HOST_DEVICE __attribute__((always_inline))
#endif

// The CPU kernels are compiled once per instruction set. Each build has a namespace of its own, so that the
// linker can never give code for a newer processor to an older one.
#if defined(FO_CPU_CAPABILITY)
#define FO_CONCATENATE_(a, b) a##b
#define FO_CONCATENATE(a, b) FO_CONCATENATE_(a, b)
#define FO_INSTRUCTION_SET FO_CONCATENATE(cpu_, FO_CPU_CAPABILITY)
#else
#define FO_INSTRUCTION_SET base
#endif

namespace fused_optim {

struct StateField {
  const char* name;
  bool per_tensor;  // one number a tensor instead of one an element
};

struct HyperField {
  const char* key;                       // key of the param group
  int index;                             // element of a pair such as betas; -1: the value itself
  const char* const* choices = nullptr;  // a string: its index in this list that ends with a null
  bool optional = false;                 // 0 where neither the group nor the optimizer has the key
};

// Norms that a rule or a clip may ask the reduce phase for.
enum Need : unsigned {
  kNeedsGradSq = 1,
  kNeedsParamSq = 2,
  kNeedsGradMax = 4,
  kNeedsDecayedSq = 8,     // of grad + weight_decay * param
  kNeedsDirectionSq = 16,  // measured by the first of two passes
  kNeedsFinite = 32        // whether all elements of the gradient are
};

// Limits that the tables are laid out for; static_asserts hold the rules to them.
constexpr int kMaxHyper = 15;
constexpr int kMaxPerTensorStates = 3;
constexpr int kScalarsBytes = 184;  // a record has a cache line's multiple with its key

// What prepare knows of one tensor, and what it may say to the mechanism.
struct TensorContext {
  double lr_scale;
  double weight_decay_scale;
  double grad_norm;             // L2 norm of the gradient, clipped and times the trust ratio, if `needs` asks
  double grad_max;              // its largest magnitude, likewise
  double param_norm;            // L2 norm of the parameter (of the master, where there is one), likewise
  double direction_norm;        // L2 norm of the direction; for scale_direction
  bool has_trust_ratio;         // not excluded from trust ratios
  double grad_scale;            // out: what update sees is this times the gradient,
  double coupled_weight_decay;  // out: plus this times the parameter
  double trust_ratio;           // out: for the log
  double state[kMaxPerTensorStates];  // the per-tensor states, read before and stored after prepare
};

inline namespace FO_INSTRUCTION_SET {

// 1 - base^exponent. The subtraction would cancel when base is near 1; expm1 does not.
FO_HOST_DEVICE inline double one_minus_power(double base, double exponent) {
  return base == 0 ? (exponent == 0 ? 0.0 : 1.0) : -expm1(exponent * log(base));
}

FO_HOST_DEVICE inline float square_root(float value) { return sqrtf(value); }
FO_HOST_DEVICE inline double square_root(double value) { return sqrt(value); }

// The larger of two, or NaN if either is: fmax would drop a NaN.
template <class T>
FO_HOST_DEVICE inline T maximum(T a, T b) {
  return b > a || b != b ? b : a;
}

// torch.sign: 0 for a NaN.
template <class T>
FO_HOST_DEVICE inline T sign(T value) {
  return value > 0 ? T(1) : value < 0 ? T(-1) : T(0);
}

}  // namespace FO_INSTRUCTION_SET
}  // namespace fused_optim
