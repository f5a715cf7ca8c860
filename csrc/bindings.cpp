// What Python sees of the extension; the only file that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <string>

#include "cpu/threads.h"
#include "plan/plan.h"
#include "plan/rule_names.h"
#include "plan/triton_table.h"

#ifndef FO_VERSION
#define FO_VERSION "unknown"
#endif
#ifndef FO_COMPILER
#define FO_COMPILER "unknown"
#endif
#ifndef FO_CPU_CAPABILITIES
#define FO_CPU_CAPABILITIES "default"
#endif
#ifndef FO_CUDA_VERSION
#define FO_CUDA_VERSION ""
#endif
#ifndef FO_CUDA_ARCHS
#define FO_CUDA_ARCHS ""
#endif

namespace py = pybind11;

namespace fused_optim {

#if !defined(FO_WITH_CUDA)
std::string why_no_cuda(int) {
  return "the extension was built without CUDA: nvcc was not found, or FUSED_OPTIM_CUDA=OFF";
}
uint64_t cuda_launches() { return 0; }
#endif

namespace {

py::object owned(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// The collector must see through the plan: param.optimizer = optimizer is a cycle that runs through it.
void make_collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    if (!py::detail::is_holder_constructed(self)) return 0;
    return py::cast<const Plan&>(py::handle(self)).traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (py::detail::is_holder_constructed(self)) py::cast<Plan&>(py::handle(self)).clear();
    return 0;
  };
}

const CpuKernels* requested_kernels() {
  const char* requested = std::getenv("FUSED_OPTIM_CPU_CAPABILITY");
  const CpuKernels* kernels = choose_cpu_kernels(requested);
  if (kernels == nullptr) {
    throw py::value_error(
        std::string("FUSED_OPTIM_CPU_CAPABILITY=") + requested +
        " names no instruction set that was built and that this processor runs; choose from " +
        FO_CPU_CAPABILITIES);
  }
  return kernels;
}

std::unique_ptr<Plan> make_plan(const py::list& rules, const py::list& rows, const py::list& triton_rows,
                                const py::dict& defaults, const py::tuple& structural,
                                const py::object& exchange_api, const py::object& kind_of,
                                const py::object& same_placement, const py::object& describe,
                                const py::object& current_stream, const py::object& negative_bit,
                                const py::object& tensor_shim, const py::object& make_room,
                                const py::object& trust_ratio, const py::dict& limits,
                                const py::object& check) {
  auto plan = std::make_unique<Plan>();
  if (!plan->open(exchange_api.ptr(), kind_of.ptr(), same_placement.ptr(), describe.ptr(),
                  current_stream.ptr(), negative_bit.ptr(), tensor_shim.ptr(), make_room.ptr(),
                  requested_kernels()) ||
      !plan->build(rules.ptr(), rows.ptr(), triton_rows.ptr(), defaults.ptr(), structural.ptr(),
                   trust_ratio.ptr(), limits.ptr(), check.ptr())) {
    throw py::error_already_set();
  }
  return plan;
}

// For each rule what Python knows of it too: its states, and where its hyperparameters stand in a group.
py::dict rules() {
  py::dict result;
  for (const RuleNames& rule : rule_names()) {
    py::list states, hyper;
    for (size_t i = 0; i < rule.state_names.size(); ++i) {
      states.append(py::make_tuple(py::handle(rule.state_names[i]), bool(rule.per_tensor[i])));
    }
    for (const RuleNames::Hyper& entry : rule.hyper) {
      py::list choices;
      for (const char* const* word = entry.field.choices; word != nullptr && *word != nullptr; ++word) {
        choices.append(*word);
      }
      hyper.append(
          py::make_tuple(entry.field.key, entry.field.index, py::tuple(choices), entry.field.optional));
    }
    result[rule.name.c_str()] = py::make_tuple(py::tuple(states), py::tuple(hyper));
  }
  return result;
}

// The fields of a group and of a row in the table of rows that Triton steps.
py::tuple table_fields() {
  const TritonFields fields = triton_fields();
  return py::make_tuple(py::tuple(py::cast(fields.group)), py::tuple(py::cast(fields.row)));
}

py::dict build_info() {
  py::dict info;
  info["version"] = FO_VERSION;
  info["compiler"] = FO_COMPILER;
  info["cpu_capabilities"] = FO_CPU_CAPABILITIES;
  info["cuda_version"] = FO_CUDA_VERSION;
  info["cuda_archs"] = FO_CUDA_ARCHS;
  return info;
}

}  // namespace
}  // namespace fused_optim

PYBIND11_MODULE(_C, module) {
  using namespace fused_optim;
  py::class_<Plan>(module, "Plan", py::custom_type_setup(make_collectable))
      .def(py::init(&make_plan), py::kw_only(), py::arg("rules"), py::arg("rows"),
           py::arg("triton_rows") = py::list(), py::arg("defaults"), py::arg("structural"),
           py::arg("exchange_api"), py::arg("kind_of"), py::arg("same_placement"), py::arg("describe"),
           py::arg("current_stream") = py::none(), py::arg("negative_bit") = py::none(),
           py::arg("tensor_shim") = py::none(), py::arg("make_room") = py::none(),
           py::arg("trust_ratio") = py::none(), py::arg("limits") = py::dict(), py::arg("check") = py::none())
      .def("refresh",
           [](Plan& plan, const py::object& param_groups, const py::object& state) {
             return owned(plan.refresh(param_groups.ptr(), state.ptr()));
           })
      .def("reduce",
           [](Plan& plan, const py::object& step) {
             double sum = 0;
             if (!plan.reduce(step.ptr(), &sum)) throw py::error_already_set();
             return sum;
           })
      .def("apply",
           [](Plan& plan, const py::object& step) {
             if (!plan.apply(step.ptr())) throw py::error_already_set();
           })
      .def("release", &Plan::release)
      .def("non_finite", &Plan::non_finite)
      .def(
          "write_table",
          [](const Plan& plan, size_t device, const py::buffer& words) {
            plan.write_table(device, static_cast<int64_t*>(words.request(true).ptr));
          },
          py::arg("device"), py::arg("words"))
      .def("captured", &Plan::captured)
      .def("norms", [](const Plan& plan) { return owned(plan.norms()); })
      .def("written", [](Plan& plan) { return owned(plan.written()); });
  module.def("build_info", &build_info);
  module.def("rules", &rules);
  module.def("table_fields", &table_fields);
  module.def("cpu_capability", [] { return requested_kernels()->capability; });
  module.def("has_openmp", &has_openmp);
  module.def("knows_exchange_api", [](const py::object& capsule) {
    const dlpack::ExchangeApi* api = nullptr;
    if (!known_exchange_api(capsule.ptr(), api)) throw py::error_already_set();
    return api != nullptr;
  });
  module.def("why_no_cuda", &why_no_cuda);
  module.def("cuda_launches", &cuda_launches);
}
