#include "plan/plan.h"

#include "plan/attributes.h"
#include "plan/overlaps.h"

namespace fused_optim {

bool Plan::open(PyObject* exchange_api, PyObject* kind_of, PyObject* same_placement, PyObject* describe,
                PyObject* current_stream, PyObject* negative_bit, PyObject* tensor_shim, PyObject* make_room,
                const CpuKernels* kernels) {
  kernels_ = kernels;
  Py_INCREF(make_room);
  make_room_ = make_room;
  return reader_.open(exchange_api, kind_of, same_placement, describe, current_stream, negative_bit,
                      tensor_shim);
}

bool Plan::build(PyObject* rules, PyObject* rows, PyObject* triton_rows, PyObject* defaults,
                 PyObject* structural, PyObject* trust_ratio, PyObject* limits, PyObject* check) {
  if (!group_reader_.open(rules, defaults, structural, trust_ratio, limits, check)) return false;
  for (Py_ssize_t r = 0; r < PyList_GET_SIZE(rows); ++r) {
    hosts_.emplace_back();
    rows_.push_back({});
    HostRow& host = hosts_.back();
    Row& row = rows_.back();
    if (!row_reader_.add(PyList_GET_ITEM(rows, r), host, row)) return false;
    const auto group = static_cast<size_t>(row.group);
    row.rule = group_reader_.rule_of(group);
    group_reader_.add_row(group, host.native ? &host.device : nullptr);
  }
  if (!read_triton_rows(triton_rows)) return false;
  make_phases();
  if (!(devices_.empty() && triton_rows_.empty())) group_reader_.leave_device_tensors();
  return true;
}

bool Plan::read_triton_rows(PyObject* devices) {
  for (Py_ssize_t d = 0; d < PyList_GET_SIZE(devices); ++d) {
    PyObject* indices = PyList_GET_ITEM(devices, d);
    triton_rows_.emplace_back();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(indices); ++i) {
      const size_t row = PyLong_AsSize_t(PyList_GET_ITEM(indices, i));
      if (PyErr_Occurred()) return false;
      triton_rows_.back().push_back(row);
      hosts_.at(row).is_triton = true;
    }
  }
  return true;
}

PyObject* Plan::refresh(PyObject* param_groups, PyObject* state) {
  release();
  collected_ = false;
  if (!PyList_Check(param_groups) ||
      static_cast<size_t>(PyList_GET_SIZE(param_groups)) != group_reader_.size() || !PyDict_Check(state)) {
    Py_RETURN_NONE;
  }
  PyObject* unready = nullptr;  // a list, once there is a row for it
  row_reader_.begin();
  active_elements_ = active_rows_ = 0;
  const auto leave = [&](PyObject* result) {
    Py_XDECREF(unready);
    release();
    return result;
  };
  const auto report = [&](size_t r, const char* reason) {
    if (unready == nullptr && (unready = PyList_New(0)) == nullptr) return false;
    PyObject* entry = Py_BuildValue("(ns)", static_cast<Py_ssize_t>(r), reason);
    const bool good = entry != nullptr && PyList_Append(unready, entry) == 0;
    Py_XDECREF(entry);
    return good;
  };
  size_t r = 0;
  for (size_t g = 0; g < group_reader_.size(); ++g) {
    PyObject* params;
    const auto read =
        group_reader_.refresh(PyList_GET_ITEM(param_groups, static_cast<Py_ssize_t>(g)), g, &params);
    if (read == GroupReader::Read::error) return leave(nullptr);
    if (read == GroupReader::Read::stale) {
      leave(nullptr);
      Py_RETURN_NONE;
    }
    PyObject** items = PySequence_Fast_ITEMS(params);
    for (const size_t end = r + group_reader_.row_count(g); r < end; ++r) {
      HostRow& host = hosts_[r];
      if (*items++ != host.param || row_reader_.any_has_died() || Py_TYPE(host.param) != host.type) {
        leave(nullptr);
        Py_RETURN_NONE;
      }
      const bool was_active = rows_[r].active;
      rows_[r].active = false;
      host.grad = RowReader::grad_of(host);
      if (host.grad == nullptr) return leave(nullptr);
      if (host.grad != Py_None) {
        Py_INCREF(host.param);
        host.held = true;
        const char* reason = row_reader_.refresh(host, rows_[r], state);
        if (reason == nullptr) {
          rows_[r].active = true;
          active_elements_ += rows_[r].numel;
          ++active_rows_;
        } else if (*reason == '\0') {
          leave(nullptr);
          Py_RETURN_NONE;
        } else if (!report(r, reason)) {
          return leave(nullptr);
        }
      }
      if (rows_[r].active != was_active) active_changed_ = true;
    }
  }
  if (row_reader_.written_moved() || active_changed_) find_overlaps(rows_, hosts_);
  active_changed_ = false;
  for (r = 0; r < rows_.size(); ++r) {
    if (!rows_[r].active || !hosts_[r].overlapping) continue;
    rows_[r].active = false;
    active_changed_ = true;
    active_elements_ -= rows_[r].numel;
    --active_rows_;
    if (!report(r, "overlap")) return leave(nullptr);
  }
  for (CudaPhases* phases : devices_) {
    void* stream;
    if (!reader_.read_stream(phases->device(), &stream)) return leave(nullptr);
    phases->work_on(stream);
  }
  return unready != nullptr ? unready : PyTuple_New(0);
}

PyObject* Plan::written() const {
  const auto is_written = [&](size_t r) { return rows_[r].active && hosts_[r].held; };
  Py_ssize_t count = 0;
  for (size_t r = 0; r < rows_.size(); ++r) count += is_written(r);
  PyObject* list = PyList_New(count);
  count = 0;
  for (size_t r = 0; list != nullptr && r < rows_.size(); ++r) {
    if (!is_written(r)) continue;
    Py_INCREF(hosts_[r].param);
    PyList_SET_ITEM(list, count++, hosts_[r].param);
  }
  return list;
}

void Plan::release() {
  for (HostRow& host : hosts_) {
    Py_CLEAR(host.grad);
    if (!host.held) continue;
    host.held = false;
    Py_DECREF(host.param);
  }
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const HostRow& host : hosts_) {
    if (host.held) Py_VISIT(host.param);
    Py_VISIT(host.param_ref);
    Py_VISIT(host.grad);
  }
  Py_VISIT(make_room_);
  for (const int visited : {group_reader_.traverse(visit, arg), row_reader_.traverse(visit, arg)}) {
    if (visited != 0) return visited;
  }
  return reader_.traverse(visit, arg);
}

void Plan::clear() {
  // Emptied before anything is let go of: a destructor may run Python code that meets this plan.
  std::vector<HostRow> hosts;
  hosts.swap(hosts_);
  rows_.clear();
  devices_.clear();
  phases_.clear();
  for (HostRow& host : hosts) {
    Py_CLEAR(host.grad);
    if (host.held) Py_DECREF(host.param);
    Py_CLEAR(host.param_ref);
  }
  Py_CLEAR(make_room_);
  row_reader_.clear();
  group_reader_.clear();
  reader_.clear();
}

}  // namespace fused_optim
