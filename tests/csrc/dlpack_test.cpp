// Compares csrc/plan/dlpack.h with the copy of the DLPack header that torch ships: sizes, offsets and
// constants.
#include "plan/dlpack.h"

#include <ATen/dlpack.h>

#include <cstddef>

namespace ours = fused_optim::dlpack;

#define SAME(our_type, our_field, their_type, their_field)                                     \
  static_assert(offsetof(our_type, our_field) == offsetof(their_type, their_field), "offset"); \
  static_assert(sizeof(our_type::our_field) == sizeof(their_type::their_field), "size")

static_assert(sizeof(ours::Device) == sizeof(DLDevice), "Device");
static_assert(sizeof(ours::DataType) == sizeof(DLDataType), "DataType");
static_assert(sizeof(ours::Tensor) == sizeof(DLTensor), "Tensor");
static_assert(sizeof(ours::Version) == sizeof(DLPackVersion), "Version");
static_assert(sizeof(ours::ExchangeApiHeader) == sizeof(DLPackExchangeAPIHeader), "ExchangeApiHeader");
static_assert(sizeof(ours::ExchangeApi) <= sizeof(DLPackExchangeAPI), "ExchangeApi may end earlier");

SAME(ours::Device, device_type, DLDevice, device_type);
SAME(ours::Device, device_id, DLDevice, device_id);
SAME(ours::DataType, code, DLDataType, code);
SAME(ours::DataType, bits, DLDataType, bits);
SAME(ours::DataType, lanes, DLDataType, lanes);
SAME(ours::Tensor, data, DLTensor, data);
SAME(ours::Tensor, device, DLTensor, device);
SAME(ours::Tensor, ndim, DLTensor, ndim);
SAME(ours::Tensor, dtype, DLTensor, dtype);
SAME(ours::Tensor, shape, DLTensor, shape);
SAME(ours::Tensor, strides, DLTensor, strides);
SAME(ours::Tensor, byte_offset, DLTensor, byte_offset);
SAME(ours::Version, major, DLPackVersion, major);
SAME(ours::Version, minor, DLPackVersion, minor);
SAME(ours::ExchangeApiHeader, version, DLPackExchangeAPIHeader, version);
SAME(ours::ExchangeApiHeader, prev_api, DLPackExchangeAPIHeader, prev_api);
SAME(ours::ExchangeApi, header, DLPackExchangeAPI, header);
SAME(ours::ExchangeApi, managed_tensor_allocator, DLPackExchangeAPI, managed_tensor_allocator);
SAME(ours::ExchangeApi, managed_tensor_from_py_object_no_sync, DLPackExchangeAPI,
     managed_tensor_from_py_object_no_sync);
SAME(ours::ExchangeApi, managed_tensor_to_py_object_no_sync, DLPackExchangeAPI,
     managed_tensor_to_py_object_no_sync);
SAME(ours::ExchangeApi, dltensor_from_py_object_no_sync, DLPackExchangeAPI, dltensor_from_py_object_no_sync);
SAME(ours::ExchangeApi, current_work_stream, DLPackExchangeAPI, current_work_stream);

static_assert(ours::kMajorVersion == DLPACK_MAJOR_VERSION, "major version");
static_assert(static_cast<int>(ours::kCPU) == kDLCPU, "CPU");
static_assert(static_cast<int>(ours::kCUDA) == kDLCUDA, "CUDA");
static_assert(static_cast<int>(ours::kROCM) == kDLROCM, "ROCM");
static_assert(static_cast<int>(ours::kFloat) == kDLFloat, "float");
static_assert(static_cast<int>(ours::kBfloat) == kDLBfloat, "bfloat");

int main() { return 0; }
