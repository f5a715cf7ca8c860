// A table in a device's memory, and how it comes to hold what the plan has found for a step.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/layout.h"

namespace fused_optim {

template <int kWords>
struct PatchWords;

// Gives memory of the device back that torch's allocator holds and does not use.
using MakeRoom = std::function<void()>;

// One device allocation and what the host knows of its front part.
struct Table {
  unsigned char* base = nullptr;
  std::vector<uint32_t> mirror;  // empty: nothing is known of it
  bool used = false;             // kernels may have been told to read it

  // Where there is no memory, once more after make_room.
  Table(int device, size_t bytes, const MakeRoom& make_room);
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

// What the tables of one device's rows should hold, and how it gets there. Nothing here waits for a stream,
// but after a step that has failed.
class TableWriter {
 public:
  // layout outlives it.
  TableWriter(int device, const TableLayout& layout, MakeRoom make_room);

  // Takes over what a table should hold from now on.
  void write(const std::vector<Row>& rows, const std::vector<GroupHyper>& groups,
             const std::vector<HyperTensors>& tensors);

  // A table of which nothing is known.
  std::unique_ptr<Table> make_table() const;

  // Makes the table on the device equal to that, before what follows on a stream.
  void send(Table& table, cudaStream_t stream);

  // A new table that holds it, for the replays of the graph that a stream is captured into: it lives as long
  // as the graph and what is instantiated from it.
  const Table& table_for_replays(cudaStream_t stream) const;

 private:
  unsigned char* bytes(size_t offset) { return reinterpret_cast<unsigned char*>(words_.data()) + offset; }
  void upload(const Table& table) const;

  template <int kWords>
  void patch(void (*kernel)(PatchWords<kWords>), Table& table, cudaStream_t stream);

  const int device_;
  const TableLayout& layout_;
  const MakeRoom make_room_;
  const bool has_large_patches_;
  std::vector<uint32_t> words_;    // what a table should hold
  std::vector<uint32_t> changed_;  // offsets
};

// Frees the tables whose graphs are gone.
void free_tables_of_graphs();

}  // namespace fused_optim
