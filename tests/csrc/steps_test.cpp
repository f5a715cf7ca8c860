// Steps every rule over every number format without Python, and prints a hash of all bytes that came out. The
// same program on another processor must print the same lines.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/phases.h"

using namespace fused_optim;

namespace {

uint64_t random_state = 1;

uint32_t random_bits() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(random_state >> 33);
}

// Powers of two and a mantissa, from integers alone: the same on every processor.
double random_number() {
  const double sign = random_bits() % 2 ? 1 : -1;
  return sign * (1 + random_bits() % 4096 / 4096.0) / static_cast<double>(1u << (random_bits() % 20));
}

void put(std::vector<unsigned char>& bytes, DType dtype, int64_t i, double value) {
  const auto as_float = static_cast<float>(value);
  if (dtype == DType::float64) std::memcpy(&bytes[static_cast<size_t>(8 * i)], &value, 8);
  if (dtype == DType::float32) std::memcpy(&bytes[static_cast<size_t>(4 * i)], &as_float, 4);
  if (dtype == DType::bfloat16)
    store(*reinterpret_cast<bfloat16*>(&bytes[static_cast<size_t>(2 * i)]), as_float);
  if (dtype == DType::float16)
    store(*reinterpret_cast<float16*>(&bytes[static_cast<size_t>(2 * i)]), as_float);
}

uint64_t hash(uint64_t seed, const std::vector<unsigned char>& bytes) {
  for (const unsigned char byte : bytes) seed = (seed ^ byte) * 1099511628211u;
  return seed;
}

// A rule, its states, and hyperparameters in the order of its Hyper.
struct Case {
  int rule, tensor_states, element_states;
  std::vector<double> hyper;
};

const Case kCases[] = {
    {0, 1, 2, {0.01, 0.9, 0.99, 1e-8, 0.1, 0, 0}},           // adamw, coupled
    {0, 1, 2, {0.01, 0.9, 0.99, 1e-8, 0.1, 1, 2}},           // adamw, decoupled twice
    {1, 1, 3, {0.01, 0.9, 0.99, 1e-8, 0.1, 1, 0}},           // amsgrad
    {2, 0, 0, {0.01, 0.1}},                                  // sgd
    {3, 1, 1, {0.01, 0.9, 0.5, 0.1, 1, 0}},                  // momentum, nesterov
    {4, 2, 1, {0.01, 0.9, 0.99, 1e-8, 0.1, 0, 0, 0, 0, 2}},  // novograd
    {5,
     3,
     1,
     {0.01, 0.9, 0.99, 1e-8, 0.1, 2, 1, 1, 0, 0}},        // novograd, amsgrad, apex with the largest element
    {6, 1, 2, {0.01, 0.9, 0.99, 1e-8, 0.1, 1, 1, 0, 0}},  // lamb
    {7, 0, 1, {0.01, 0.9, 0.99, 0.1}},                    // lion
};

uint64_t train(const CpuKernels& kernels, const Case& test, DType dtype, bool trust, int64_t numel) {
  random_state = 7;
  Row row{};
  row.numel = numel;
  row.lr_scale = row.weight_decay_scale = 1;
  row.rule = test.rule;
  row.active = row.clipped = row.has_trust_ratio = true;
  float numbers[kMaxPerTensorStates] = {};
  std::vector<std::vector<unsigned char>> columns(static_cast<size_t>(kColumns));
  const int first = kFirstState + test.tensor_states;
  for (int c = 0; c < first + test.element_states; ++c) {
    if (c == kMaster) continue;
    const bool per_tensor = c >= kFirstState && c < first;
    row.dtype[c] = per_tensor ? DType::float32 : dtype;
    if (per_tensor) {
      row.address[c] = reinterpret_cast<uint64_t>(&numbers[c - kFirstState]);
      continue;
    }
    auto& bytes = columns[static_cast<size_t>(c)];
    bytes.resize(static_cast<size_t>(numel * size_of(dtype)));
    row.address[c] = reinterpret_cast<uint64_t>(bytes.data());
    for (int64_t i = 0; c <= kGrad && i < numel; ++i) put(bytes, dtype, i, random_number());
  }
  GroupHyper hyper{};
  std::memcpy(hyper.rule, test.hyper.data(), test.hyper.size() * sizeof(double));
  if (trust) hyper.trust = {0.02, 1e-8, 0, 1, kZeroNormSkip, kDecayInNorm, 1, 1};
  hyper.needs = needs_of_rule(test.rule, hyper);
  hyper.needs |= needs_of(hyper.trust, static_cast<unsigned>(hyper.needs));
  const std::vector<Row> rows{row};
  const std::vector<GroupHyper> groups{hyper};
  CpuPhases phases(kernels, groups, rows.size(), {0});
  Step step{};
  step.options = {0.5, Clip::none, 0, 0, 0};
  step.threads = 2;
  step.global_norm = 0;
  for (int t = 0; t < 5; ++t) {
    phases.collect(rows);
    phases.apply(step);
  }
  uint64_t result = 14695981039346656037u;
  for (const auto& bytes : columns) result = hash(result, bytes);
  return result;
}

}  // namespace

int main() {
  const CpuKernels* kernels = choose_cpu_kernels("default");
  if (kernels == nullptr) return 1;
  for (const Case& test : kCases) {
    for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
      for (const bool trust : {false, true}) {
        for (const int64_t numel : {int64_t{1}, int64_t{17}, int64_t{5000}, int64_t{300001}}) {
          const uint64_t bits = train(*kernels, test, dtype, trust, numel);
          std::printf("case %ld dtype %d trust %d numel %ld: %016lx\n", static_cast<long>(&test - kCases),
                      static_cast<int>(dtype), trust, static_cast<long>(numel),
                      static_cast<unsigned long>(bits));
        }
      }
    }
  }
}
