// The element loops of the CPU backend; compiled once for each instruction set (FO_CPU_CAPABILITY).
//
// A row is walked in tiles that stay in the first-level cache. A column that lies in memory as the compute
// type is used where it is; any other is widened into a scratch tile and rounded back once. So a rule's loop
// exists once a compute type, whatever the storages, and the compiler vectorises it.
//
// Nothing here may be shared with the other builds: every function is in this build's namespace, and no
// standard container is used.
#include "cpu/kernels.h"

#include "cpu/codes_avx512.h"
#include "cpu/tiles.h"

#define FO_STRINGIFY_(a) #a
#define FO_STRINGIFY(a) FO_STRINGIFY_(a)

namespace fused_optim {
namespace {

// A rule without states has no array of length 0 in C++.
constexpr int at_least_one(int count) { return count > 0 ? count : 1; }

// The element loop. Conversions stand in the same loop as the mathematics, so that they run in the shadow of
// its root and division; where all columns are T they are nothing. roots: if kRoots, those of the second
// state as it will be encoded, which most rules have taken anyway.
template <class Rule, class T, int kStates, bool kRoots = false, class Param, class Grad, class State>
void update(Param* __restrict param, const Grad* __restrict grad,
            State* const (&states)[at_least_one(kStates)], const Record<Rule, T>& record, int64_t n,
            float* __restrict roots = nullptr) {
  static_assert(kStates <= 3, "spell out one more __restrict pointer");
  const Record<Rule, T> s = record;
  State* __restrict state0 = states[0];
  State* __restrict state1 = states[kStates > 1 ? 1 : 0];
  State* __restrict state2 = states[kStates > 2 ? 2 : 0];
  for (int64_t i = 0; i < n; ++i) {
    T state[at_least_one(kStates)];
    if constexpr (kStates > 0) state[0] = load(state0[i]);
    if constexpr (kStates > 1) state[1] = load(state1[i]);
    if constexpr (kStates > 2) state[2] = load(state2[i]);
    T value = load(param[i]);
    Rule::update(value, transform(s.grad, static_cast<T>(load(grad[i])), value), state, s.scalars);
    store(param[i], value);
    if constexpr (kStates > 0) store(state0[i], state[0]);
    if constexpr (kStates > 1) store(state1[i], state[1]);
    if constexpr (kStates > 2) store(state2[i], state[2]);
    if constexpr (kRoots) roots[i] = RootCode::magnitude(state[1]);
  }
}

// What a rule sees of a gradient element, with the question for a weight decay answered before the loop: out
// of a long loop the compiler does not take it, and without masks it then vectorises nothing (AVX2: 6 times
// slower, measured).
template <bool kDecays, class T>
T transform_of(const GradTransform<T>& grad, T value, T param) {
  value = transform(grad, value);
  return kDecays ? value + grad.weight_decay * param : value;
}

// The usual bfloat16 rows, straight from memory to memory.
template <class Rule, int kStates, class Param, class State>
void update_in_place(const Row& row, const Record<Rule, float>& record, int64_t begin, int64_t n) {
  constexpr int kFirst = kFirstState + per_tensor_states<Rule>();
  State* states[at_least_one(kStates)] = {};
  for (int k = 0; k < kStates; ++k) states[k] = column<State>(row, kFirst + k) + begin;
  update<Rule, float, kStates>(column<Param>(row, kParam) + begin, column<Param>(row, kGrad) + begin, states,
                               record, n);
}

// bfloat16 rows with a master of 24 bits and float32 states, likewise, of elements whose places have the same
// upper half.
template <class Rule, int kStates, bool kDecays>
void update_split8(const Row& row, const Record<Rule, float>& record, uint32_t of_upper, int64_t begin,
                   int64_t n) {
  static_assert(kStates <= 3, "spell out one more __restrict pointer");
  constexpr int kFirst = kFirstState + per_tensor_states<Rule>();
  const Record<Rule, float> s = record;
  bfloat16* __restrict param = column<bfloat16>(row, kParam) + begin;
  int8_t* __restrict remainder = column<int8_t>(row, kMaster) + begin;
  const bfloat16* __restrict grad = column<bfloat16>(row, kGrad) + begin;
  float* __restrict state0 = column<float>(row, kFirst) + begin;
  float* __restrict state1 = column<float>(row, kFirst + (kStates > 1 ? 1 : 0)) + begin;
  float* __restrict state2 = column<float>(row, kFirst + (kStates > 2 ? 2 : 0)) + begin;
  const auto lower = static_cast<uint32_t>(row.first + begin);
  for (int32_t i = 0; i < static_cast<int32_t>(n); ++i) {
    float state[at_least_one(kStates)];
    if constexpr (kStates > 0) state[0] = state0[i];
    if constexpr (kStates > 1) state[1] = state1[i];
    if constexpr (kStates > 2) state[2] = state2[i];
    float value = load_split8(param[i], remainder[i]);
    Rule::update(value, transform_of<kDecays>(s.grad, load(grad[i]), value), state, s.scalars);
    store_split8(param[i], remainder[i], value, random_word(of_upper, lower + static_cast<uint32_t>(i)));
    if constexpr (kStates > 0) state0[i] = state[0];
    if constexpr (kStates > 1) state1[i] = state[1];
    if constexpr (kStates > 2) state2[i] = state[2];
  }
}

// The element loop of a tile whose two states are codes, an average of gradients and one of squares: they are
// decoded in the shadow of the root and the division. means, roots: the codes as floats; afterwards the first
// state, and the root of the second, as they will be encoded.
template <class Rule, bool kDecays>
void update_codes(float* __restrict param, const float* __restrict grad, float* __restrict means,
                  float* __restrict roots, const float* __restrict powers_of_means,
                  const float* __restrict powers_of_roots, const Record<Rule, float>& record, int64_t n) {
  const Record<Rule, float> s = record;
  for (int64_t i = 0; i < n; ++i) {
    float state[2] = {decode_mean(means[i], powers_of_means[i]), decode_root(roots[i], powers_of_roots[i])};
    float value = param[i];
    Rule::update(value, transform_of<kDecays>(s.grad, grad[i], value), state, s.scalars);
    param[i] = value;
    means[i] = state[0];
    roots[i] = RootCode::magnitude(state[1]);
  }
}

// Rows whose two states are codes, of elements whose places have the same upper half.
template <class Rule, bool kDecays>
void apply_codes(const Row& row, const Record<Rule, float>& record, uint32_t of_upper, int64_t begin,
                 int64_t end) {
  constexpr int kMean = kFirstState + per_tensor_states<Rule>(), kRoot = kMean + 1;
  alignas(64) float scratch[2][kScratch], powers[2][kScratch];
  alignas(64) uint32_t words[kTile];
  ToEncode found;
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    int8_t* mean_codes = column<int8_t>(row, kMean) + i;
    uint8_t* root_codes = column<uint8_t>(row, kRoot) + i;
    uint8_t *mean_scales = scales_of(row, kMean, i), *root_scales = scales_of(row, kRoot, i);
    prefetch_tile(row, i + kTile, end);
    float* param = load_param<float>(row, i, n, scratch[0]);
    const float* grad = load_tile<float>(row, kGrad, i, n, scratch[1]);
    const uint32_t first = static_cast<uint32_t>(row.first + i) * kPlaceStride + of_upper;
    bool is_encoded = false;
#if defined(FO_HAS_CODES_AVX512)
    const bool fits = are_finite(mean_codes, root_codes, n);
    if (fits) {
      update_groups<Rule, kDecays>(param, grad, mean_codes, root_codes, mean_scales, root_scales, record, n,
                                   found);
      const bool wants_words = row.stochastic || row.dtype[kMaster] == DType::int8;
      is_encoded = encode_groups(found, mean_codes, root_codes, mean_scales, root_scales,
                                 wants_words ? words : nullptr, n, first);
    }
#else
    constexpr bool fits = false;
#endif
    if (!fits) {
      widen_codes(mean_codes, found.means, n);
      widen_codes(root_codes, found.roots, n);
      powers_of_tile(mean_scales, MeanCode::kUnit, powers[0], n);
      powers_of_tile(root_scales, RootCode::kUnit, powers[1], n);
      update_codes<Rule, kDecays>(param, grad, found.means, found.roots, powers[0], powers[1], record, n);
    }
    if (!is_encoded) {
      encode_tile<MeanCode, true>(found.means, mean_codes, mean_scales, words, n, first);
      encode_tile<RootCode>(found.roots, root_codes, root_scales, words, n);
    }
    store_param<float>(row, i, n, param, words);
  }
}

// The tiles of a row's states.
template <class T, int kStates>
void load_states(const Row& row, int first, int64_t begin, int64_t n,
                 T (&scratch)[at_least_one(kStates)][kScratch], T* (&states)[at_least_one(kStates)]) {
  for (int k = 0; k < kStates; ++k) states[k] = load_state_tile<T>(row, first + k, begin, n, scratch[k]);
}

template <class Rule, class T>
void apply(const Row& row, const ScalarsRecord& bytes, int64_t begin, int64_t end, bool only_states) {
  constexpr int kFirst = kFirstState + per_tensor_states<Rule>();
  constexpr int kStates = Rule::kStateCount - per_tensor_states<Rule>();
  const auto& record = *reinterpret_cast<const Record<Rule, T>*>(bytes.bytes);
  if constexpr (sizeof(T) == 4) {
    const bool decays = record.grad.weight_decay != 0;
    const DType param = row.dtype[kParam];
    DType states = kStates > 0 ? row.dtype[kFirst] : param;
    for (int k = 1; k < kStates; ++k) states = row.dtype[kFirst + k] == states ? states : DType::none;
    if (row.dtype[kMaster] == DType::none && row.dtype[kGrad] == param && !row.draws) {
      const int64_t n = end - begin;
      if (param == DType::bfloat16 && states == DType::bfloat16) {
        return update_in_place<Rule, kStates, bfloat16, bfloat16>(row, record, begin, n);
      }
      if (param == DType::bfloat16 && states == DType::float32) {
        return update_in_place<Rule, kStates, bfloat16, float>(row, record, begin, n);
      }
    }
    if (row.dtype[kMaster] == DType::int8 && row.dtype[kGrad] == DType::bfloat16 &&
        (kStates == 0 || states == DType::float32)) {
      const auto update = decays ? update_split8<Rule, kStates, true> : update_split8<Rule, kStates, false>;
      return for_each_upper(
          row, bytes.key, begin, end - begin,
          [&](uint32_t of_upper, int64_t at, int64_t n) { update(row, record, of_upper, begin + at, n); });
    }
    if constexpr (kStates == 2) {
      if (row.dtype[kFirst] == DType::int8 && row.dtype[kFirst + 1] == DType::uint8) {
        const auto update = decays ? apply_codes<Rule, true> : apply_codes<Rule, false>;
        return for_each_upper(row, bytes.key, begin, end - begin,
                              [&](uint32_t of_upper, int64_t at, int64_t n) {
                                update(row, record, of_upper, begin + at, begin + at + n);
                              });
      }
    }
  }
  alignas(64) T scratch[2][kScratch];
  alignas(64) T state_scratch[at_least_one(kStates)][kScratch];
  alignas(64) uint32_t words[kTile];
  constexpr bool kCanHaveRoots = sizeof(T) == 4 && kStates > 1;
  alignas(64) float roots[kCanHaveRoots ? kTile : 1];
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    prefetch_tile(row, i + kTile, end);
    if (row.draws) draw_words(row, bytes.key, i, n, words);
    if (only_states) {
      for (int k = 0; k < kStates; ++k) prefetch_column(row, kFirst + k, i + kTile, end);
    }
    T* param = load_param<T>(row, i, n, scratch[0]);
    const T* grad = load_tile<T>(row, kGrad, i, n, scratch[1]);
    T* states[at_least_one(kStates)] = {};
    load_states<T, kStates>(row, kFirst, i, n, state_scratch, states);
    bool knows_roots = false;
    if constexpr (kCanHaveRoots) knows_roots = row.dtype[kFirst + 1] == DType::uint8;
    if (knows_roots) {
      update<Rule, T, kStates, kCanHaveRoots>(param, grad, states, record, n, roots);
    } else {
      update<Rule, T, kStates>(param, grad, states, record, n);
    }
    store_param<T>(row, i, n, param, words);
    for (int k = 0; k < kStates; ++k) {
      store_state_tile<T>(row, kFirst + k, i, n, states[k], words, knows_roots && k == 1 ? roots : nullptr);
    }
  }
}

// Lanes that a sum of squares runs in: a fixed number, so that every instruction set adds in the same order.
constexpr int kLanes = 64;

// Adds lanes [width, 2 * width) to lanes [0, width), and so on down to one; every width known to the
// compiler, or more than half of a sum's time goes into this.
template <int width, class Sum>
inline void fold(Sum* lanes) {
  if constexpr (width > 0) {
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
    fold<width / 2>(lanes);
  }
}

template <class T>
GradTransform<T> as_it_is() {
  return {1, static_cast<T>(-HUGE_VAL), static_cast<T>(HUGE_VAL), 0};
}

// kScaled: false where the transform is as_it_is(), which costs more than the square and its sum.
template <bool kScaled, class T, class Sum>
Sum sum_of_squares(const T* __restrict values, const GradTransform<T>& grad, int64_t n) {
  const auto square = [&](T element) {
    const Sum value = static_cast<Sum>(kScaled ? transform(grad, element) : element);
    return value * value;
  };
  Sum lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += square(values[i + k]);
  }
  for (int k = 0; i + k < n; ++k) lanes[k] += square(values[i + k]);
  fold<kLanes / 2>(lanes);
  return lanes[0];
}

// In float where that neither overflows nor loses a square to underflow, otherwise again in double.
template <bool kScaled, class T>
double sum_tile(const T* values, const GradTransform<T>& grad, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    const float sum = sum_of_squares<kScaled, float, float>(values, grad, n);
    if (sum > 1e-20f && sum < 1e30f) return static_cast<double>(sum);
  }
  return sum_of_squares<kScaled, T, double>(values, grad, n);
}

template <class T>
double sum_tile(const T* values, const GradTransform<T>& grad, int64_t n) {
  const GradTransform<T> nothing = as_it_is<T>();
  const bool scaled = grad.scale != nothing.scale || grad.min != nothing.min || grad.max != nothing.max;
  return scaled ? sum_tile<true>(values, grad, n) : sum_tile<false>(values, grad, n);
}

template <class T>
double sum_tile(const T* values, int64_t n) {
  return sum_tile<false>(values, as_it_is<T>(), n);
}

template <class T>
double max_tile(const T* __restrict values, const GradTransform<T>& grad, int64_t n) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const T value = transform(grad, values[i + k]);
      lanes[k] = maximum(lanes[k], value < 0 ? -value : value);
    }
  }
  for (int k = 0; i + k < n; ++k) {
    const T value = transform(grad, values[i + k]);
    lanes[k] = maximum(lanes[k], value < 0 ? -value : value);
  }
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) lanes[k] = maximum(lanes[k], lanes[k + width]);
  }
  return static_cast<double>(lanes[0]);
}

// x - x is 0 for what is finite and NaN for what is not, and a NaN stays in its sum.
template <class T>
bool is_finite_tile(const T* __restrict values, int64_t n) {
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += values[i + k] - values[i + k];
  }
  for (int k = 0; i + k < n; ++k) lanes[k] += values[i + k] - values[i + k];
  fold<kLanes / 2>(lanes);
  return lanes[0] == 0;
}

template <class T>
void decay_tile(const T* __restrict values, const T* __restrict param, const GradTransform<T>& grad,
                T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = transform(grad, values[i], param[i]);
}

template <class T>
Norms reduce(const Row& row, const GradTransform<double>& grad, unsigned needs, int64_t begin, int64_t end,
             bool& non_finite) {
  const GradTransform<T> of_grad{static_cast<T>(grad.scale), static_cast<T>(grad.min),
                                 static_cast<T>(grad.max), static_cast<T>(grad.weight_decay)};
  alignas(64) T scratch[3][kScratch];
  const bool reads_param = (needs & (kNeedsParamSq | kNeedsDecayedSq)) != 0;
  Norms norms{};
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    const T* values = load_tile<T>(row, kGrad, i, n, scratch[0]);
    // From the elements: a sum of squares may overflow where they are finite, and clamped ones say nothing.
    if ((needs & kNeedsFinite) != 0 && !is_finite_tile(values, n)) non_finite = true;
    if ((needs & kNeedsGradSq) != 0) norms.grad_sq += sum_tile<T>(values, of_grad, n);
    if ((needs & kNeedsGradMax) != 0)
      norms.grad_max = maximum(norms.grad_max, max_tile<T>(values, of_grad, n));
    if (!reads_param) continue;
    const T* param = load_param<T>(row, i, n, scratch[1]);
    if ((needs & kNeedsParamSq) != 0) norms.param_sq += sum_tile<T>(param, n);
    if ((needs & kNeedsDecayedSq) != 0) {
      decay_tile(values, param, of_grad, scratch[2], n);
      norms.decayed_sq += sum_tile<T>(scratch[2], n);
    }
  }
  return norms;
}

// kDirection: at once with the direction, for states that lie in memory as T; the root and the division then
// run while memory is waited for.
template <bool kDirection, class Rule, class T>
void accumulate_tile(const T* __restrict param, const T* __restrict grad, T* __restrict state0,
                     T* __restrict state1, const Record<Rule, T>& record, T* __restrict out, int64_t n) {
  const Record<Rule, T> s = record;
  for (int64_t i = 0; i < n; ++i) {
    T state[2] = {state0[i], state1[i]};
    Rule::accumulate(transform(s.grad, grad[i], param[i]), state, s.scalars);
    state0[i] = state[0];
    state1[i] = state[1];
    if constexpr (kDirection) out[i] = Rule::direction(param[i], state, s.scalars);
  }
}

template <class Rule, class T>
void direction_tile(const T* __restrict param, const T* __restrict state0, const T* __restrict state1,
                    const Record<Rule, T>& record, T* __restrict out, int64_t n) {
  const Record<Rule, T> s = record;
  for (int64_t i = 0; i < n; ++i) {
    const T state[2] = {state0[i], state1[i]};
    out[i] = Rule::direction(param[i], state, s.scalars);
  }
}

template <class Rule>
constexpr int element_states() {
  return Rule::kStateCount - per_tensor_states<Rule>();
}

// The first pass of a rule with a direction: its states, and the norms of direction and param.
template <class Rule, class T>
Norms accumulate(const Row& row, const ScalarsRecord& bytes, int64_t begin, int64_t end, void* directions) {
  constexpr int kFirst = kFirstState + per_tensor_states<Rule>();
  constexpr int kStates = element_states<Rule>();
  static_assert(kStates == 2, "spell out the pointers of another number of states");
  const auto& record = *reinterpret_cast<const Record<Rule, T>*>(bytes.bytes);
  alignas(64) T scratch[3][kScratch];
  alignas(64) T state_scratch[kStates][kScratch];
  alignas(64) uint32_t words[kTile];
  Norms norms{};
  if constexpr (Rule::kKeepsDirection) {
    for (int64_t i = begin; i < end; i += kTile) {
      const int64_t n = end - i < kTile ? end - i : kTile;
      prefetch_tile(row, i + kTile, end);
      if (row.draws) draw_words(row, bytes.key, i, n, words);
      const T* grad = load_tile<T>(row, kGrad, i, n, scratch[1]);
      // Only a coupled weight decay asks for the parameter.
      const T* param = record.grad.weight_decay != 0 ? load_param<T>(row, i, n, scratch[0]) : grad;
      T* buffer = load_state_tile<T>(row, kFirst, i, n, state_scratch[0]);
      T* direction = room_for_tile<T>(row, kFirst + 1, i, state_scratch[1]);
      accumulate_tile<false, Rule, T>(param, grad, buffer, direction, record, scratch[2], n);
      store_state_tile<T>(row, kFirst, i, n, buffer, words);
      store_direction_tile<T>(row, kFirst + 1, i, n, direction);
    }
    return norms;
  }
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    prefetch_tile(row, i + kTile, end);
    if (row.draws) draw_words(row, bytes.key, i, n, words);
    const T* param = load_param<T>(row, i, n, scratch[0]);
    const T* grad = load_tile<T>(row, kGrad, i, n, scratch[1]);
    T* states[kStates];
    load_states<T, kStates>(row, kFirst, i, n, state_scratch, states);
    T* direction = directions != nullptr ? static_cast<T*>(directions) + i : scratch[2];
    if (states[0] != state_scratch[0] && states[1] != state_scratch[1]) {
      accumulate_tile<true, Rule, T>(param, grad, states[0], states[1], record, direction, n);
    } else {
      accumulate_tile<false, Rule, T>(param, grad, states[0], states[1], record, direction, n);
      for (int k = 0; k < kStates; ++k) store_state_tile<T>(row, kFirst + k, i, n, states[k], words);
      load_states<T, kStates>(row, kFirst, i, n, state_scratch, states);  // as they were rounded
      direction_tile<Rule, T>(param, states[0], states[1], record, direction, n);
    }
    norms.direction_sq += sum_tile<T>(direction, n);
    norms.param_sq += sum_tile<T>(param, n);
  }
  return norms;
}

template <class T>
void move_tile(T* __restrict param, T step_size, const T* __restrict direction, int64_t n) {
  for (int64_t i = 0; i < n; ++i) param[i] = param[i] - step_size * direction[i];
}

template <class T>
void move(const Row& row, const ScalarsRecord& bytes, double step_size, const void* directions) {
  alignas(64) T scratch[kScratch];
  alignas(64) uint32_t words[kTile];
  for (int64_t i = 0; i < row.numel; i += kTile) {
    const int64_t n = row.numel - i < kTile ? row.numel - i : kTile;
    if (row.draws) draw_words(row, bytes.key, i, n, words);
    T* param = load_param<T>(row, i, n, scratch);
    move_tile(param, static_cast<T>(step_size), static_cast<const T*>(directions) + i, n);
    store_param<T>(row, i, n, param, words);
  }
}

// The second pass: the param moves along the direction.
template <class Rule, class T>
void apply_direction(const Row& row, const ScalarsRecord& bytes, int64_t begin, int64_t end, bool) {
  constexpr int kFirst = kFirstState + per_tensor_states<Rule>();
  constexpr int kStates = element_states<Rule>();
  const auto& record = *reinterpret_cast<const Record<Rule, T>*>(bytes.bytes);
  alignas(64) T scratch[2][kScratch];
  alignas(64) T state_scratch[kStates][kScratch];
  alignas(64) uint32_t words[kTile];
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    prefetch_tile(row, i + kTile, end);
    if (row.draws) draw_words(row, bytes.key, i, n, words);
    T* param = load_param<T>(row, i, n, scratch[0]);
    T* states[kStates];
    if constexpr (Rule::kKeepsDirection) {
      states[0] = states[1] = load_tile<T>(row, kFirst + 1, i, n, state_scratch[1]);
    } else {
      load_states<T, kStates>(row, kFirst, i, n, state_scratch, states);
    }
    direction_tile<Rule, T>(param, states[0], states[1], record, scratch[1], n);
    move_tile(param, record.scalars.step_size, scratch[1], n);
    store_param<T>(row, i, n, param, words);
  }
}

template <class Rule, class T>
constexpr ApplyFunction apply_function() {
  if constexpr (Rule::kHasDirection) {
    return apply_direction<Rule, T>;
  } else {
    return apply<Rule, T>;
  }
}

template <class Rule, class T>
constexpr AccumulateFunction accumulate_function() {
  if constexpr (Rule::kHasDirection) {
    return accumulate<Rule, T>;
  } else {
    return nullptr;
  }
}

template <class... R>
constexpr CpuKernels kernels_of(RuleList<R...>) {
  return {FO_STRINGIFY(FO_CPU_CAPABILITY),
          {apply_function<R, float>()...},
          {apply_function<R, double>()...},
          {accumulate_function<R, float>()...},
          {accumulate_function<R, double>()...},
          move<float>,
          move<double>,
          reduce<float>,
          reduce<double>};
}

}  // namespace

extern const CpuKernels FO_CONCATENATE(cpu_kernels_, FO_CPU_CAPABILITY) = kernels_of(Rules{});

}  // namespace fused_optim
