// The apply phase on the device: one kernel an element update and compute type, which serves every
// combination of storages. Rules that differ in prepare alone share it.
//
// A warp updates one tile of a row. It picks the code for the row's storages once a tile, so that rows of all
// storages share a launch; the combinations that matter have code of their own (FloatLayouts), all others go
// through AnyLayout. A tile that is whole and aligned is walked in vectors and computed with QuickFloats, any
// other one by elements. Loads of all columns are under way before the first result is needed;
// tests/backends/test_machine_code.py reads from the machine code that they are.
#include <type_traits>

#include "cuda/device.h"
#include "cuda/storages.h"

namespace fused_optim {
namespace {

// What a launch does to each element. A rule with a direction takes two: the first updates its states and
// measures param and direction, the second moves the param.
enum class Pass { update, accumulate, move };

template <class Rule>
constexpr int element_states() {
  return Rule::kStateCount - per_tensor_states<Rule>();
}

// Of these, those that a pass reads: the first of two no direction that is kept, the second nothing else.
template <class Rule>
constexpr int states_read(Pass pass) {
  if (!Rule::kKeepsDirection) return element_states<Rule>();
  return pass == Pass::move ? 1 : element_states<Rule>() - 1;
}

// Those whose columns a pass has.
template <class Rule>
constexpr int states_of(Pass pass) {
  return Rule::kKeepsDirection && pass == Pass::move ? 1 : element_states<Rule>();
}

// Blocks that a multiprocessor runs at once: as many as registers allow without a spill.
template <class T>
constexpr int blocks_at_once(Pass pass, int states) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return 2;  // what is the same for a warp takes every thread's registers there
#endif
  return sizeof(T) == 8 || pass != Pass::update || states > 2 ? 2 : FO_BLOCKS;
}

// Vectors of each column that a thread asks for before it waits. The memory of an H200 is busy where each
// multiprocessor has asked for 48 KB, that of an H100 with 32 KB.
template <class T, class L>
constexpr int vectors_in_flight(Pass pass, int states) {
  constexpr int kBytesInFlight = FO_KB_IN_FLIGHT * 1024;
  const int bytes = L::kParamBytes + (pass == Pass::move ? 0 : L::kGradBytes) + states * L::kStateBytes;
  const int of_one = blocks_at_once<T>(pass, states) * kThreads * bytes * L::kVector;
  if (L::kCodes && states > 1) return blocks_at_once<T>(pass, states) > 2 ? 1 : 2;  // more have no registers
  int count = 1;  // a power of 2, as what a tile has is
  constexpr int kMost = kTile / kWarp / L::kVector;
  while (sizeof(T) == 4 && count * of_one < kBytesInFlight && count < kMost) count *= 2;
  return count;
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

FO_DEVICE DirectionSums sum_warp(DirectionSums sums) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    sums.direction_sq += __shfl_down_sync(0xffffffffu, sums.direction_sq, distance);
    sums.param_sq += __shfl_down_sync(0xffffffffu, sums.param_sq, distance);
  }
  return sums;
}

// The columns of one row, in one layout, as one pass of a rule walks them.
template <Pass kPass, class Rule, class T, class L>
class Columns {
 public:
  static constexpr int kVector = L::kVector;

  FO_DEVICE Columns(const Row& row, int first_state, int64_t begin, typename L::Words words)
      : param_(row, kParam, begin),
        grad_(row, kGrad, begin),
        state_{{row, kStates > 0 ? first_state : kParam, begin},
               {row, kStates > 1 ? first_state + 1 : kParam, begin},
               {row, kStates > 2 ? first_state + 2 : kParam, begin}},
        words_(words) {
    if constexpr (L::kCodes && kStates > 1) state_[1].roots = true;
  }

  // kCount vectors of N elements of each lane, from `first` on, which are asked for together. Adds to sums.
  // With QuickFloats: false, and `first` is where to go on with floats, if a lane has a result that is NaN.
  template <class Number, int N, int kCount>
  FO_DEVICE bool walk(const Record<Rule, Number>& s, int& first, int n, int lane, DirectionSums& sums) const {
    typename Param::template Loaded<N> params[kCount];
    typename Grad::template Loaded<N> grads[kCount];
    typename State::template Loaded<N> states[kCount][kRoom];
    int i = place<N>(first, lane);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int plus = u * kApart<N>;
      if (N == 1 && i + plus >= n) continue;
      if constexpr (kPass != Pass::move) grads[u] = grad_.template fetch<N>(i, plus);
      params[u] = param_.template fetch<N>(i, plus);
#pragma unroll
      for (int k = 0; k < kRead; ++k) states[u][k] = state_[k].template fetch<N>(i, plus);
    }
#if defined(__CUDA_ARCH__)
    // No load moves behind it. The compiler would have the second vector's wait until the first is computed,
    // where that needs little else to be kept meanwhile; with two states it does not, and this costs an
    // instruction. Of a rule that keeps its direction it would have the param's wait for the answer whether a
    // coupled weight decay asks for it.
    constexpr bool kParamMayWait = Rule::kKeepsDirection && kPass == Pass::accumulate;
    if (N > 1 && (kParamMayWait || (kCount > 1 && (kPass == Pass::move || kStates < 2))))
      asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
#endif
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int plus = u * kApart<N>;
      if (N == 1 && i + plus >= n) continue;
      Number value[N], grad[N], state[kRoom][N], direction[N];
      param_.widen(params[u], value);
      if constexpr (kPass != Pass::move) grad_.widen(grads[u], grad);
#pragma unroll
      for (int k = 0; k < kRead; ++k) state_[k].widen(states[u][k], state[k]);
      if constexpr (kPass != Pass::move) transform(s.grad, grad, value);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        Number element[kRoom];
#pragma unroll
        for (int k = 0; k < kRead; ++k) element[k] = state[k][e];
        if constexpr (kPass == Pass::update) {
          Rule::update(value[e], grad[e], element, s.scalars);
        } else if constexpr (kPass == Pass::accumulate) {
          Rule::accumulate(grad[e], element, s.scalars);
        } else {
          value[e] = value[e] - s.scalars.step_size * Rule::direction(value[e], element, s.scalars);
        }
#pragma unroll
        for (int k = 0; k < kStates; ++k) state[k][e] = element[k];
      }
      if constexpr (L::kDraws) {
        // Four elements at a time: there are no registers for the words of all.
#pragma unroll
        for (int k = 0; k < kStates; ++k) state_[k].find_exponent(state[k], states[u][k]);
#pragma unroll
        for (int e = 0; e < N; e += 4) {
          const WordsOfFour words = words_.of_four(i + plus + e);
          param_.narrow_four(e, value, params[u], words);
#pragma unroll
          for (int k = 0; k < kStates; ++k) state_[k].narrow_four(e, state[k], states[u][k], words);
        }
      }
      if constexpr (!L::kDraws) {
        const auto words = words_.template of<N>(i + plus);
        if constexpr (kPass != Pass::accumulate) param_.narrow(value, params[u], words);
        if constexpr (kPass != Pass::move) {
#pragma unroll
          for (int k = 0; k < kRead; ++k) state_[k].narrow(state[k], states[u][k], words);
#pragma unroll  // a direction that is kept
          for (int k = kRead; k < kStates; ++k) state_[k].narrow(state[k], states[u][k], words.to_nearest());
        }
      }
      bool nan = any_nan(value);
#pragma unroll
      for (int k = 0; k < kStates; ++k) nan = nan | state_[k].is_not_sure(state[k], states[u][k]);
      if constexpr (kMeasures) {
#pragma unroll
        for (int k = 0; k < kStates; ++k) state_[k].widen(states[u][k], state[k]);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          Number element[kRoom];
#pragma unroll
          for (int k = 0; k < kStates; ++k) element[k] = state[k][e];
          direction[e] = Rule::direction(value[e], element, s.scalars);
        }
        nan = nan | any_nan(direction);
      }
      if (std::is_same<Number, QuickFloat>::value && __any_sync(0xffffffffu, nan)) {
        first += plus;
        return false;
      }
#if defined(__CUDA_ARCH__)
      // Five addresses are computed anew, not kept since the loads: there are no registers for them.
      if (N > 1 && kCount > 1 && Param::kColumns + kStates > 3) asm("" : "+r"(i));
#endif
      if constexpr (kMeasures) {
#pragma unroll
        for (int e = 0; e < N; ++e) {
          sums.direction_sq += static_cast<double>(direction[e]) * static_cast<double>(direction[e]);
          sums.param_sq += static_cast<double>(value[e]) * static_cast<double>(value[e]);
        }
      } else if constexpr (kPass != Pass::accumulate) {
        param_.template put<N>(i, plus, params[u]);
      }
      if constexpr (kPass != Pass::move) {
#pragma unroll
        for (int k = 0; k < kStates; ++k) state_[k].template put<N>(i, plus, states[u][k]);
      }
    }
    return true;
  }

 private:
  static constexpr int kStates = states_of<Rule>(kPass);
  static constexpr int kRead = states_read<Rule>(kPass);
  static constexpr bool kMeasures = kPass == Pass::accumulate && !Rule::kKeepsDirection;
  static constexpr int kRoom = kStates > 0 ? kStates : 1;
  static_assert(kStates <= 3, "spell out one more column");
  // What the first of two passes leaves behind, the second reads.
  static constexpr Reuse kReuse = kPass == Pass::accumulate ? Reuse::soon : Reuse::none;
  using Param = typename L::template Param<T, kReuse>;
  using Grad = typename L::template Grad<T>;
  using State = typename L::template State<T, kReuse>;

  // Where a lane's first vector lies, or its first element, and how far apart they are. Elements lie side by
  // side over the lanes, but where a sum is taken: there each lane takes those of its vectors, so that a sum
  // has one order whatever the addresses are.
  template <int N>
  static constexpr int kApart = N == 1 && kVector > 1 && kPass == Pass::accumulate ? 1 : kWarp * N;
  template <int N>
  FO_DEVICE static int place(int first, int lane) {
    if (N > 1) return first;
    if (kApart<N> != 1) return first + lane;
    const int within = first % (kWarp * kVector);
    return first - within + lane * kVector + within / kWarp;
  }

  Param param_;
  Grad grad_;
  State state_[3];
  typename L::Words words_;
};

// What is computed with where a whole vector is at hand.
template <class T>
struct NumberOf {
  using type = T;
};
template <>
struct NumberOf<float> {
  using type = QuickFloat;
};

template <Pass kPass, class Rule, class T, class L>
FO_DEVICE DirectionSums walk_tile(const Row& row, int first_state, const Record<Rule, T>& record,
                                  int64_t begin, int n, int lane) {
  using Number = typename NumberOf<T>::type;
  constexpr int N = L::kVector;
  const Columns<kPass, Rule, T, L> columns(row, first_state, begin, NoWords{});
  DirectionSums sums{0, 0};
  constexpr int kElements = sizeof(T) == 8 ? 2 : 4;
  if constexpr (N == 1) {
#pragma unroll 1
    for (int first = 0; first < n; first += kWarp * kElements)
      columns.template walk<T, 1, kElements>(record, first, n, lane, sums);
  } else {
    constexpr int kStrip = vectors_in_flight<T, L>(kPass, states_of<Rule>(kPass)) * kWarp * N;
    static_assert(kTile % kStrip == 0, "a tile is a number of strips");
    Record<Rule, Number> numbers;
    static_assert(sizeof numbers == sizeof record, "a record holds numbers only");
    __builtin_memcpy(&numbers, &record, sizeof record);
    uint64_t addresses = row.address[kParam] | row.address[kGrad] | row.address[kMaster];
#pragma unroll
    for (int k = 0; k < states_of<Rule>(kPass); ++k) addresses |= row.address[first_state + k];
    const bool whole = n == kTile && addresses % 16 == 0 && has_quick_bounds(numbers.grad);
#pragma unroll 1
    for (int own = lane * N; own - lane * N < n; own += kStrip) {
      int first = own;
      if (whole && columns.template walk<Number, N, kStrip / kWarp / N>(numbers, first, n, lane, sums))
        continue;
      first -= lane * N;
#pragma unroll 1
      do {
        columns.template walk<T, 1, kElements>(record, first, n, lane, sums);
        first += kWarp * kElements;
      } while (first % kStrip != 0);
    }
  }
  return sums;
}

template <Pass kPass, class Rule, class T, class L, class... Others>
FO_DEVICE DirectionSums walk_tile_as(LayoutList<L, Others...>, uint64_t storages, const Row& row,
                                     int first_state, const Record<Rule, T>& record, int64_t begin, int n,
                                     int lane) {
  if constexpr (sizeof...(Others) != 0) {
    constexpr uint64_t kStorages = L::storages(states_of<Rule>(kPass));
    if (storages != kStorages) {
      return walk_tile_as<kPass, Rule, T>(LayoutList<Others...>{}, storages, row, first_state, record, begin,
                                          n, lane);
    }
  }
  return walk_tile<kPass, Rule, T, L>(row, first_state, record, begin, n, lane);
}

// What a warp updates where rows may draw random words.
template <class Rule, class T>
struct Tile {
  const Row& row;
  const Record<Rule, T>& record;
  const ScalarsRecord& prepared;  // with the key of the words
  int first_state;
  int64_t begin;
  int n;
  int lane;
};

// How many elements of a tile are done after its vectors, in one layout: all, or those before a vector that
// is out of the ordinary.
template <Pass kPass, class L, class Rule, class T>
FO_DEVICE int walk_vectors(const Tile<Rule, T>& tile) {
  using Number = typename NumberOf<T>::type;
  constexpr int N = L::kVector, kStates = states_of<Rule>(kPass);
  constexpr int kStrip = vectors_in_flight<T, L>(kPass, kStates) * kWarp * N;
  static_assert(kTile % kStrip == 0, "a tile is a number of strips");
  Record<Rule, Number> numbers;
  static_assert(sizeof numbers == sizeof tile.record, "a record holds numbers only");
  __builtin_memcpy(&numbers, &tile.record, sizeof numbers);
  const uint64_t* address = tile.row.address;
  uint64_t addresses = address[kParam] | address[kGrad] | address[kMaster];
#pragma unroll
  for (int k = 0; k < kStates; ++k) addresses |= address[tile.first_state + k];
  const auto place = static_cast<uint32_t>(tile.row.first + tile.begin);
  const bool whole = tile.n == kTile && addresses % 16 == 0 && has_quick_bounds(numbers.grad) &&
                     place + (kTile - 1u) >= place;
  if (!whole) return 0;
  const uint32_t* key = &tile.prepared.key;
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(key));  // read here: there is no register to keep it in from where the branches part
#endif
  const Columns<kPass, Rule, T, L> columns(tile.row, tile.first_state, tile.begin,
                                           {tile.row, *key, tile.begin});
  DirectionSums unused{0, 0};
  int own = tile.lane * N;
#pragma unroll 1
  for (; own - tile.lane * N < kTile; own += kStrip) {
    if (!columns.template walk<Number, N, kStrip / kWarp / N>(numbers, own, tile.n, tile.lane, unused)) break;
  }
  return own - tile.lane * N;
}

template <Pass kPass, class Rule, class T, class... L>
FO_DEVICE int walk_vectors_as(LayoutList<L...>, [[maybe_unused]] uint64_t storages,
                              [[maybe_unused]] const Tile<Rule, T>& tile) {
  [[maybe_unused]] constexpr int kStates = states_of<Rule>(kPass);
  int done = 0;
  ((L::fits(storages, tile.row.stochastic, kStates) ? void(done = walk_vectors<kPass, L>(tile)) : void()),
   ...);
  return done;
}

template <Pass kPass, class Rule, class T>
FO_DEVICE DirectionSums walk_elements(const Tile<Rule, T>& tile, int first) {
  const Columns<kPass, Rule, T, AnyDrawnLayout<T>> columns(tile.row, tile.first_state, tile.begin,
                                                           {tile.row, tile.prepared.key, tile.begin});
  DirectionSums sums{0, 0};
#pragma unroll 1
  for (; first < tile.n; first += kWarp)
    columns.template walk<T, 1, 1>(tile.record, first, tile.n, tile.lane, sums);
  return sums;
}

template <Pass kPass, class Rule, class T>
FO_DEVICE DirectionSums walk_drawn_tile(const Bucket& bucket, int row, uint64_t storages,
                                        Tile<Rule, T> tile) {
  constexpr int kStates = states_of<Rule>(kPass);
  if constexpr (sizeof(T) == 8) {  // nothing is rounded
    using Wide = Layout<kF64, kF64, kNone, kF64>;
    if (storages == Wide::storages(kStates)) {
      return walk_tile<kPass, Rule, T, Wide>(tile.row, tile.first_state, tile.record, tile.begin, tile.n,
                                             tile.lane);
    }
  }
  const int done = walk_vectors_as<kPass>(DrawnLayouts<T, kPass == Pass::update, kStates>{}, storages, tile);
#if defined(__CUDA_ARCH__)
  asm("" : "+r"(row));  // addresses are computed anew, not kept through the loop over vectors
#endif
  return walk_elements<kPass>(Tile<Rule, T>{bucket.rows[row], tile.record, bucket.records[row],
                                            tile.first_state, tile.begin, tile.n, tile.lane},
                              done);
}

// One tile of a row, by one warp. kDraws: where rows may draw random words.
template <Pass kPass, class Rule, class T, bool kDraws>
FO_DEVICE DirectionSums update_tile(const Bucket& bucket, const Extent& extent, int64_t tile, int lane) {
  const Row& row = bucket.rows[extent.row];
  const int first_state = bucket.first_state + element_states<Rule>() - states_of<Rule>(kPass);
  const uint64_t storages = storages_of(row, first_state, states_of<Rule>(kPass));
  if (storages == 0) return {0, 0};
  const int64_t begin = (tile - extent.first_tile) * kTile;
  const int64_t left = row.numel - begin;
  const int n = left < kTile ? static_cast<int>(left) : kTile;
  Record<Rule, T> record;
  // Said to be aligned, which an array of bytes is not: it would be loaded byte by byte.
  const ScalarsRecord& prepared = bucket.records[extent.row];
  __builtin_memcpy(&record, __builtin_assume_aligned(prepared.bytes, alignof(ScalarsRecord)), sizeof record);
  if constexpr (kDraws) {
    return walk_drawn_tile<kPass, Rule, T>(bucket, extent.row, storages,
                                           {row, record, prepared, first_state, begin, n, lane});
  } else {
    return walk_tile_as<kPass, Rule, T>(Layouts<states_of<Rule>(kPass)>{}, storages, row, first_state, record,
                                        begin, n, lane);
  }
}

// Adds the sums of a block's tiles, in their order, row by row: for each of its rows one sum.
FO_DEVICE void add_up_block(const Bucket& bucket, const Extent& extent, int64_t tile,
                            const DirectionSums& own) {
  __shared__ DirectionSums of_warp[kWarpsPerBlock];
  __shared__ int32_t row_of_warp[kWarpsPerBlock];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const DirectionSums of_tile = sum_warp(own);
  const bool first = threadIdx.x % kWarp == 0;
  if (first) {
    of_warp[warp] = of_tile;
    row_of_warp[warp] = extent.row;
  }
  __syncthreads();
  if (!first || extent.row < 0 || (warp > 0 && row_of_warp[warp - 1] == extent.row)) return;
  DirectionSums total = of_warp[warp];
  for (int w = warp + 1; w < kWarpsPerBlock && row_of_warp[w] == extent.row; ++w) {
    total.direction_sq += of_warp[w].direction_sq;
    total.param_sq += of_warp[w].param_sq;
  }
  bucket.direction_sums[extent.first_sum + tile / kWarpsPerBlock - extent.first_tile / kWarpsPerBlock] =
      total;
}

template <Pass kPass, class Rule, class T, bool kDraws>
__global__ void __launch_bounds__(kThreads, blocks_at_once<T>(kPass, states_of<Rule>(kPass)))
    apply_kernel(Bucket bucket) {
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
  if (skip) return;
  DirectionSums sums{0, 0};
  if (extent.row >= 0) sums = update_tile<kPass, Rule, T, kDraws>(bucket, extent, tile, lane);
  if constexpr (kPass == Pass::accumulate && !Rule::kKeepsDirection) add_up_block(bucket, extent, tile, sums);
}

template <class Rule, class T, bool kDraws, class... R>
constexpr ApplyKernel last_pass(RuleList<R...>) {
  if constexpr (Rule::kHasDirection) {
    return apply_kernel<Pass::move, Rule, T, kDraws>;
  } else {
    return apply_kernel<Pass::update, decltype(first_alike<Rule, R...>()), T, kDraws>;
  }
}

template <class Rule, class T, bool kDraws>
constexpr ApplyKernel first_pass() {
  if constexpr (Rule::kHasDirection) {
    return apply_kernel<Pass::accumulate, Rule, T, kDraws>;
  } else {
    return nullptr;
  }
}

// In double one kernel is for all rows.
template <class... R>
ApplyKernel last_pass_of(RuleList<R...> rules, const Kernel& kernel) {
  static const ApplyKernel in_float_table[] = {last_pass<R, float, false>(rules)...};
  static const ApplyKernel drawn_table[] = {last_pass<R, float, true>(rules)...};
  static const ApplyKernel in_double_table[] = {last_pass<R, double, true>(rules)...};
  return (kernel.in_double ? in_double_table : kernel.draws ? drawn_table : in_float_table)[kernel.rule];
}

template <class... R>
ApplyKernel first_pass_of(RuleList<R...>, const Kernel& kernel) {
  static constexpr ApplyKernel in_float_table[] = {first_pass<R, float, false>()...};
  static constexpr ApplyKernel drawn_table[] = {first_pass<R, float, true>()...};
  static constexpr ApplyKernel in_double_table[] = {first_pass<R, double, true>()...};
  return (kernel.in_double ? in_double_table : kernel.draws ? drawn_table : in_float_table)[kernel.rule];
}

}  // namespace

ApplyKernel apply_kernel_of(const Kernel& kernel) { return last_pass_of(Rules{}, kernel); }
ApplyKernel accumulate_kernel_of(const Kernel& kernel) { return first_pass_of(Rules{}, kernel); }

}  // namespace fused_optim
