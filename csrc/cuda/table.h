// A table in a device's memory, and how it comes to hold what the plan has found for a step.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/layout.h"

namespace fused_optim {

template <int kWords>
struct PatchWords;

// One device allocation and what the host knows of its front part.
struct Table {
  unsigned char* base = nullptr;
  std::vector<uint32_t> mirror;  // empty: nothing has been sent yet

  Table(int device, size_t bytes);
  ~Table();
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  template <class Value>
  Value* at(size_t offset) const {
    return reinterpret_cast<Value*>(base + offset);
  }

 private:
  int device_;
};

// What the tables of one device's rows should hold, and how it gets there.
class TableWriter {
 public:
  // layout outlives it.
  TableWriter(int device, const TableLayout& layout);
  ~TableWriter();
  TableWriter(const TableWriter&) = delete;
  TableWriter& operator=(const TableWriter&) = delete;

  // Takes over what a table should hold from now on.
  void write(const std::vector<Row>& rows, const std::vector<GroupHyper>& groups,
             const std::vector<HyperTensors>& tensors);

  // Makes the table on the device equal to that, on a stream.
  void send(Table& table, cudaStream_t stream);

  // A new table that holds it, beside all streams: it is there, on the device, before this returns.
  std::unique_ptr<Table> upload();

 private:
  unsigned char* bytes(size_t offset) { return reinterpret_cast<unsigned char*>(words_.data()) + offset; }

  template <int kWords>
  void patch(void (*kernel)(PatchWords<kWords>), Table& table, cudaStream_t stream);

  const int device_;
  const TableLayout& layout_;
  const bool has_large_patches_;
  std::vector<uint32_t> words_;     // what a table should hold
  std::vector<uint32_t> changed_;   // offsets
  cudaEvent_t uploaded_ = nullptr;  // the last upload of words_
  bool uploading_ = false;
};

}  // namespace fused_optim
