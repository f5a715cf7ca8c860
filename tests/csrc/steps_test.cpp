// Steps every rule over every number format without Python, and prints a hash of all bytes that came out. The
// same program on another processor must print the same lines.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "phases_cpu.h"

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

uint64_t train(const CpuKernels& kernels, int rule, int states, DType dtype, bool decoupled, int64_t numel) {
  random_state = 7;
  Row row{};
  row.numel = numel;
  row.lr_scale = row.weight_decay_scale = 1;
  row.rule = rule;
  row.active = row.clipped = true;
  float step = 0;
  std::vector<std::vector<unsigned char>> columns(static_cast<size_t>(kColumns));
  for (int c = 0; c < kFirstState + states; ++c) {
    if (c == kMaster) continue;
    row.dtype[c] = c == kFirstState ? DType::float32 : dtype;
    if (c == kFirstState) {
      row.address[c] = reinterpret_cast<uint64_t>(&step);
      continue;
    }
    auto& bytes = columns[static_cast<size_t>(c)];
    bytes.resize(static_cast<size_t>(numel * size_of(dtype)));
    row.address[c] = reinterpret_cast<uint64_t>(bytes.data());
    for (int64_t i = 0; c <= kGrad && i < numel; ++i) put(bytes, dtype, i, random_number());
  }
  GroupHyper hyper{};
  const double values[] = {0.01, 0.9, 0.99, 1e-8, 0.1, decoupled ? 1.0 : 0.0};
  std::memcpy(hyper.rule, values, sizeof values);
  const std::vector<Row> rows{row};
  const std::vector<GroupHyper> groups{hyper};
  const std::vector<Norms> norms(1);
  std::vector<ScalarsRecord> records(1);
  const StepOptions options{0.5, Clip::none, 0, 0, 0};
  for (int t = 0; t < 5; ++t) {
    prepare_cpu(rows, groups, options, norms, 0, records);
    apply_cpu(kernels, rows, records, 2);
  }
  uint64_t result = 14695981039346656037u;
  for (const auto& bytes : columns) result = hash(result, bytes);
  return result;
}

}  // namespace

int main() {
  const CpuKernels* kernels = choose_cpu_kernels("default");
  if (kernels == nullptr) return 1;
  for (int rule = 0; rule < 2; ++rule) {
    for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
      for (const bool decoupled : {false, true}) {
        for (const int64_t numel : {int64_t{1}, int64_t{17}, int64_t{5000}, int64_t{300001}}) {
          const uint64_t bits = train(*kernels, rule, 3 + rule, dtype, decoupled, numel);
          std::printf("rule %d dtype %d decoupled %d numel %ld: %016lx\n", rule, static_cast<int>(dtype),
                      decoupled, static_cast<long>(numel), static_cast<unsigned long>(bits));
        }
      }
    }
  }
}
