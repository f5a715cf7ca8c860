// The apply phase on the device: one kernel an element update and compute type, which serves every
// combination of storages. Rules that differ in prepare alone share it.
//
// A warp updates one tile of a row. It picks the code for the row's storages once a tile, so that rows of all
// storages share a launch; the combinations that matter have code of their own (FloatLayouts), all others go
// through AnyLayout, which asks for each vector. Loads of all columns are under way before the first result
// is needed.
#include <initializer_list>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/vector.h"

namespace fused_optim {
namespace {

template <DType kDType>
struct StorageOf;
template <>
struct StorageOf<DType::float32> {
  using type = float;
};
template <>
struct StorageOf<DType::bfloat16> {
  using type = bfloat16;
};
template <>
struct StorageOf<DType::float16> {
  using type = float16;
};
template <>
struct StorageOf<DType::float64> {
  using type = double;
};

constexpr int widest(std::initializer_list<DType> columns) {
  int bytes = 0;
  for (const DType dtype : columns) bytes = size_of(dtype) > bytes ? size_of(dtype) : bytes;
  return bytes;
}

// The parameter as a rule sees it: itself, or its master weight beside which it is a rounded copy.
template <class T, DType kParamType, DType kMasterType, int N>
struct ParamColumns {
  using Storage = typename StorageOf<kParamType>::type;
  using Param = FixedColumn<T, Storage, N, Reuse::soon>;
  using Loaded = typename Param::Loaded;
  Param param;

  FO_DEVICE ParamColumns(const Row& row, int64_t begin) : param(row, kParam, begin) {}
  template <Reuse kReuse>
  FO_DEVICE Loaded fetch(int i, int n) const {
    return load_vector<kReuse, Storage, N>(param.address, i, n, param.aligned);
  }
  FO_DEVICE static void widen(const Loaded& loaded, T (&out)[N]) { Param::widen(loaded, out); }
  FO_DEVICE void put(int i, int n, const T (&values)[N]) const { param.put(i, n, values); }
};

template <class T, DType kParamType, int N>
struct ParamColumns<T, kParamType, DType::float32, N> {
  using Storage = typename StorageOf<kParamType>::type;
  using Param = FixedColumn<T, Storage, N, Reuse::soon>;
  using Master = FixedColumn<T, float, N>;
  struct Loaded {
    typename Param::Loaded param;
    typename Master::Loaded master;
  };
  Param param;
  Master master;

  FO_DEVICE ParamColumns(const Row& row, int64_t begin)
      : param(row, kParam, begin), master(row, kMaster, begin) {}
  FO_DEVICE ParamColumns(uint64_t param_address, uint64_t master_address)
      : param(param_address), master(master_address) {}
  template <Reuse kReuse>
  FO_DEVICE Loaded fetch(int i, int n) const {
    return {load_vector<kReuse, Storage, N>(param.address, i, n, param.aligned),
            load_vector<kReuse, float, N>(master.address, i, n, master.aligned)};
  }
  FO_DEVICE static void widen(const Loaded& loaded, T (&out)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = load_master(loaded.param.element[k], loaded.master.element[k]);
  }
  FO_DEVICE void put(int i, int n, const T (&values)[N]) const {
    master.put(i, n, values);
    Vector<Storage, N> rounded;
#pragma unroll
    for (int k = 0; k < N; ++k) store_ties_away(rounded.element[k], values[k]);
    store_vector<Reuse::soon, Storage, N>(param.address, i, n, param.aligned, rounded);
  }
};

template <class T, int N>
struct ParamColumns<T, DType::bfloat16, DType::remainder, N> {
  struct Loaded {
    Vector<bfloat16, N> upper;
    Vector<int16_t, N> lower;
  };
  bfloat16* param;
  int16_t* remainder;
  bool param_aligned, remainder_aligned;

  FO_DEVICE ParamColumns(uint64_t param_address, uint64_t remainder_address)
      : param(reinterpret_cast<bfloat16*>(param_address)),
        remainder(reinterpret_cast<int16_t*>(remainder_address)),
        param_aligned(is_aligned<2 * N>(param_address)),
        remainder_aligned(is_aligned<2 * N>(remainder_address)) {}
  FO_DEVICE ParamColumns(const Row& row, int64_t begin)
      : ParamColumns(row.address[kParam] + 2 * static_cast<uint64_t>(begin),
                     row.address[kMaster] + 2 * static_cast<uint64_t>(begin)) {}
  template <Reuse kReuse>
  FO_DEVICE Loaded fetch(int i, int n) const {
    return {load_vector<kReuse, bfloat16, N>(param, i, n, param_aligned),
            load_vector<kReuse, int16_t, N>(remainder, i, n, remainder_aligned)};
  }
  FO_DEVICE static void widen(const Loaded& loaded, T (&out)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) out[k] = load_split(loaded.upper.element[k], loaded.lower.element[k]);
  }
  FO_DEVICE void put(int i, int n, const T (&values)[N]) const {
    Loaded out;
#pragma unroll
    for (int k = 0; k < N; ++k) store_split(out.upper.element[k], out.lower.element[k], values[k]);
    store_vector<Reuse::soon, bfloat16, N>(param, i, n, param_aligned, out.upper);
    store_vector<Reuse::none, int16_t, N>(remainder, i, n, remainder_aligned, out.lower);
  }
};

template <class T, int N>
struct AnyParamColumns {
  using Loaded = typename AnyColumn<T, N>::Loaded;
  AnyColumn<T, N> param, master;

  FO_DEVICE AnyParamColumns(const Row& row, int64_t begin)
      : param(row, kParam, begin), master(row, kMaster, begin) {}

  // Calls `visit` with the columns of a parameter that has a master weight; false where it has none.
  template <class Visit>
  FO_DEVICE bool with_master(const Visit& visit) const {
    if constexpr (sizeof(T) == 4) {  // a float64 parameter has no master weight
      if (master.dtype == DType::remainder) {
        visit(ParamColumns<T, DType::bfloat16, DType::remainder, N>(param.address, master.address));
      } else if (master.dtype == DType::float32 && param.dtype == DType::bfloat16) {
        visit(ParamColumns<T, DType::bfloat16, DType::float32, N>(param.address, master.address));
      } else if (master.dtype == DType::float32) {
        visit(ParamColumns<T, DType::float16, DType::float32, N>(param.address, master.address));
      }
      return master.dtype != DType::none;
    }
    return false;
  }
  template <Reuse kReuse>
  FO_DEVICE Loaded fetch(int i, int n) const {
    Loaded out;
    const bool done = with_master(
        [&](const auto& columns) { columns.widen(columns.template fetch<kReuse>(i, n), out.element); });
    return done ? out : param.fetch(i, n);
  }
  FO_DEVICE static void widen(const Loaded& loaded, T (&out)[N]) { AnyColumn<T, N>::widen(loaded, out); }
  FO_DEVICE void put(int i, int n, const T (&values)[N]) const {
    if (!with_master([&](const auto& columns) { columns.put(i, n, values); })) param.put(i, n, values);
  }
};

// One combination of storages. A vector has the elements of 16 bytes of the widest column. A narrower column
// moves the same elements in 8 bytes: 16 would leave every other half sector of the wide columns to a second
// access.
template <DType kParamType, DType kGradType, DType kMasterType, DType kStateType>
struct Layout {
  static constexpr int kWidest = widest({kParamType, kGradType, kMasterType, kStateType});
  static constexpr int kVector = 16 / kWidest;
  template <class T>
  using Param = ParamColumns<T, kParamType, kMasterType, kVector>;
  template <class T>
  using Grad = FixedColumn<T, typename StorageOf<kGradType>::type, kVector>;
  template <class T, Reuse kReuse>
  using State = FixedColumn<T, typename StorageOf<kStateType>::type, kVector, kReuse>;

  FO_DEVICE static bool fits(const Row& row, int first_state, int states) {
    bool same =
        row.dtype[kParam] == kParamType && row.dtype[kGrad] == kGradType && row.dtype[kMaster] == kMasterType;
    for (int k = 0; k < states; ++k) same = same && row.dtype[first_state + k] == kStateType;
    return same;
  }
};

template <class T>
struct AnyLayout {
  static constexpr int kWidest = sizeof(T);
  static constexpr int kVector = 16 / kWidest;
  template <class U>
  using Param = AnyParamColumns<U, kVector>;
  template <class U>
  using Grad = AnyColumn<U, kVector>;
  template <class U, Reuse>
  using State = AnyColumn<U, kVector>;

  FO_DEVICE static bool fits(const Row&, int, int) { return true; }
};

template <class... L>
struct LayoutList {};

// The table of combinations that have code of their own: param, grad, master weight, states. Rules whose
// states differ among themselves, and everything else that the plan admits, take the last entry.
constexpr DType kNone = DType::none, kF32 = DType::float32, kF64 = DType::float64, kBf16 = DType::bfloat16,
                kF16 = DType::float16, kSplit = DType::remainder;
using FloatLayouts = LayoutList<Layout<kF32, kF32, kNone, kF32>,     // 4 + 4 bytes an element, 4 a state
                                Layout<kBf16, kBf16, kNone, kBf16>,  //
                                Layout<kBf16, kBf16, kNone, kF32>,   // state_dtype=torch.float32
                                Layout<kF16, kF16, kNone, kF16>,     //
                                Layout<kF16, kF16, kNone, kF32>,     //
                                Layout<kBf16, kBf16, kF32, kF32>,    // master_weights="float32"
                                Layout<kBf16, kF32, kF32, kF32>,  // the same with gradients kept in float32
                                Layout<kF16, kF16, kF32, kF32>,   //
                                Layout<kBf16, kBf16, kSplit, kF32>,  // master_weights="split"
                                AnyLayout<float>>;
using DoubleLayouts = LayoutList<Layout<kF64, kF64, kNone, kF64>, AnyLayout<double>>;
// For a rule without states, where some of those are the same.
using StatelessLayouts = LayoutList<Layout<kF32, kF32, kNone, kF32>,     //
                                    Layout<kBf16, kBf16, kNone, kBf16>,  //
                                    Layout<kF16, kF16, kNone, kF16>,     //
                                    Layout<kBf16, kBf16, kF32, kF32>,    //
                                    Layout<kBf16, kF32, kF32, kF32>,     //
                                    Layout<kBf16, kBf16, kSplit, kF32>,  //
                                    AnyLayout<float>>;

template <class T, int kStates>
using Layouts = typename std::conditional<
    sizeof(T) == 8, DoubleLayouts,
    typename std::conditional<kStates == 0, StatelessLayouts, FloatLayouts>::type>::type;

// What a launch does to each element. A rule with a direction takes two: the first updates its states and
// measures param and direction, the second moves the param.
enum class Pass { update, accumulate, move };

template <class Rule>
constexpr int element_states() {
  return Rule::kStateCount - per_tensor_states<Rule>();
}

// The first of the rules that have this one's update: those whose Scalars are the same type.
template <class Rule, class First, class... Others>
constexpr auto first_alike() {
  if constexpr (std::is_same<typename Rule::template Scalars<float>,
                             typename First::template Scalars<float>>::value) {
    return First{};
  } else {
    return first_alike<Rule, Others...>();
  }
}

// Elements of each column that a thread has under way at once.
constexpr int kInFlight = 8;

FO_DEVICE TileSums sum_warp(TileSums sums) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sums.direction_sq += __shfl_down_sync(0xffffffffu, sums.direction_sq, distance);
    sums.param_sq += __shfl_down_sync(0xffffffffu, sums.param_sq, distance);
  }
  return sums;
}

template <Pass kPass, class Rule, class T, class L>
FO_DEVICE TileSums walk_tile(const Row& row, int first_state, const Record<Rule, T>& s, int64_t begin, int n,
                             int lane) {
  constexpr int N = L::kVector;
  constexpr int kUnroll = L::kWidest == 8 ? 1 : kInFlight / N;
  constexpr int kStates = element_states<Rule>();
  constexpr int kRoom = kStates > 0 ? kStates : 1;
  // What the first of two passes leaves behind, the second reads.
  constexpr Reuse kReuse = kPass == Pass::accumulate ? Reuse::soon : Reuse::none;
  static_assert(kStates <= 3, "spell out one more column");
  using State = typename L::template State<T, kReuse>;
  using Param = typename L::template Param<T>;
  using Grad = typename L::template Grad<T>;
  const Param param(row, begin);
  const Grad grad(row, kGrad, begin);
  const State state[3] = {{row, kStates > 0 ? first_state : kParam, begin},
                          {row, kStates > 1 ? first_state + 1 : kParam, begin},
                          {row, kStates > 2 ? first_state + 2 : kParam, begin}};
  TileSums sums{0, 0};
  for (int strip = lane * N; strip < n; strip += kUnroll * kWarp * N) {
    typename Param::Loaded params[kUnroll];
    typename Grad::Loaded grads[kUnroll];
    typename State::Loaded states[kUnroll][kRoom];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = strip + u * kWarp * N;
      if constexpr (kPass != Pass::move) grads[u] = grad.fetch(i, n - i);
      params[u] = param.template fetch<kReuse>(i, n - i);
#pragma unroll
      for (int k = 0; k < kStates; ++k) states[u][k] = state[k].fetch(i, n - i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = strip + u * kWarp * N;
      T value[N], wide_grad[N], wide_state[kRoom][N];
      Param::widen(params[u], value);
      if constexpr (kPass != Pass::move) Grad::widen(grads[u], wide_grad);
#pragma unroll
      for (int k = 0; k < kStates; ++k) State::widen(states[u][k], wide_state[k]);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        T element[kRoom];
#pragma unroll
        for (int k = 0; k < kStates; ++k) element[k] = wide_state[k][e];
        if constexpr (kPass == Pass::update) {
          Rule::update(value[e], transform(s.grad, wide_grad[e], value[e]), element, s.scalars);
        } else if constexpr (kPass == Pass::accumulate) {
          Rule::accumulate(transform(s.grad, wide_grad[e], value[e]), element, s.scalars);
        } else {
          value[e] = value[e] - s.scalars.step_size * Rule::direction(value[e], element, s.scalars);
        }
#pragma unroll
        for (int k = 0; k < kStates; ++k) wide_state[k][e] = element[k];
        if constexpr (kPass == Pass::accumulate) {
#pragma unroll
          for (int k = 0; k < kStates; ++k) element[k] = state[k].rounded(element[k]);
          const auto direction = static_cast<double>(Rule::direction(value[e], element, s.scalars));
          const auto wide = static_cast<double>(value[e]);
          if (i + e < n) {
            sums.direction_sq += direction * direction;
            sums.param_sq += wide * wide;
          }
        }
      }
      if constexpr (kPass != Pass::accumulate) param.put(i, n - i, value);
      if constexpr (kPass != Pass::move) {
#pragma unroll
        for (int k = 0; k < kStates; ++k) state[k].put(i, n - i, wide_state[k]);
      }
    }
  }
  return sums;
}

template <Pass kPass, class Rule, class T, class L, class... Others>
FO_DEVICE TileSums walk_tile_as(LayoutList<L, Others...>, const Row& row, int first_state,
                                const Record<Rule, T>& s, int64_t begin, int n, int lane) {
  if constexpr (sizeof...(Others) != 0) {
    if (!L::fits(row, first_state, element_states<Rule>())) {
      return walk_tile_as<kPass, Rule, T>(LayoutList<Others...>{}, row, first_state, s, begin, n, lane);
    }
  }
  return walk_tile<kPass, Rule, T, L>(row, first_state, s, begin, n, lane);
}

template <Pass kPass, class Rule, class T>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(Bucket bucket) {
  const bool skip = bucket.control->skip != 0;  // asked below: the loads until there do not wait for it
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const unsigned block = bucket.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int64_t tile = static_cast<int64_t>(block) * kWarpsPerBlock + warp;
  // The block's tiles lie in the extent where its first tile does and in at most one more for each further
  // tile: one load and a ballot find the extent of this warp's tile, however small the tensors are.
  const Extent* extents = bucket.extents + bucket.first_extent[block];
  const bool passed = lane < kWarpsPerBlock && extents[1 + lane].first_tile <= tile;
  const Extent extent = extents[__popc(__ballot_sync(0xffffffffu, passed))];
  if (skip || extent.row < 0) return;
  const Row& row = bucket.rows[extent.row];
  if (!row.active) return;
  const int64_t begin = (tile - extent.first_tile) * kTile;
  const int64_t left = row.numel - begin;
  const int n = left < kTile ? static_cast<int>(left) : kTile;
  Record<Rule, T> record;
  // Said to be aligned, which an array of bytes is not: it would be loaded byte by byte.
  const void* bytes = __builtin_assume_aligned(bucket.records[extent.row].bytes, alignof(ScalarsRecord));
  __builtin_memcpy(&record, bytes, sizeof record);
  const TileSums sums = walk_tile_as<kPass, Rule, T>(Layouts<T, element_states<Rule>()>{}, row,
                                                     bucket.first_state, record, begin, n, lane);
  if constexpr (kPass == Pass::accumulate) {
    const TileSums total = sum_warp(sums);
    if (lane == 0) bucket.tile_sums[tile] = total;
  }
}

template <class Rule, class T, class... R>
constexpr ApplyKernel last_pass(RuleList<R...>) {
  if constexpr (Rule::kHasDirection) {
    return apply_kernel<Pass::move, Rule, T>;
  } else {
    return apply_kernel<Pass::update, decltype(first_alike<Rule, R...>()), T>;
  }
}

template <class Rule, class T>
constexpr ApplyKernel first_pass() {
  if constexpr (Rule::kHasDirection) {
    return apply_kernel<Pass::accumulate, Rule, T>;
  } else {
    return nullptr;
  }
}

template <class... R>
ApplyKernel last_pass_of(RuleList<R...> rules, int rule, bool in_double) {
  static const ApplyKernel in_float_table[] = {last_pass<R, float>(rules)...};
  static const ApplyKernel in_double_table[] = {last_pass<R, double>(rules)...};
  return (in_double ? in_double_table : in_float_table)[rule];
}

template <class... R>
ApplyKernel first_pass_of(RuleList<R...>, int rule, bool in_double) {
  static constexpr ApplyKernel in_float_table[] = {first_pass<R, float>()...};
  static constexpr ApplyKernel in_double_table[] = {first_pass<R, double>()...};
  return (in_double ? in_double_table : in_float_table)[rule];
}

}  // namespace

ApplyKernel apply_kernel_of(int rule, bool in_double) { return last_pass_of(Rules{}, rule, in_double); }
ApplyKernel accumulate_kernel_of(int rule, bool in_double) { return first_pass_of(Rules{}, rule, in_double); }

}  // namespace fused_optim
