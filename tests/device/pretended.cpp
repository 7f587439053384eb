// A second device for tests, "pretended": its memory and its kernels are the CPU's, but PyTorch takes it for another
// device. As on a GPU, operators refuse tensors of two devices, and numpy refuses its tensors; as on Apple's MPS, it has
// no float64. Every operator comes to `on_the_cpu`, which runs the CPU's kernel on the same memory.
//
// Built by test_device.py. PyTorch calls such a device PrivateUse1 and leaves all of it to whoever registers it.

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <unordered_map>
#include <utility>
#include <vector>

using at::IntArrayRef;
using at::Tensor;
using c10::DeviceType;
using c10::IValue;

static const c10::Device kHere(DeviceType::PrivateUse1, 0);

// ---- What PyTorch asks of any device: memory, one stream, one number

struct Memory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    return {data, data, &c10::free_cpu, kHere};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
static Memory memory;
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, &memory);

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::PrivateUse1> {
  c10::Device exchangeDevice(c10::Device) const override { return kHere; }
  c10::Device getDevice() const override { return kHere; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kHere); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks : at::PrivateUse1HooksInterface {  // no `override`: not every version of PyTorch asks for all of these
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return true; }
  c10::DeviceIndex deviceCount() const { return 1; }
  c10::DeviceIndex getCurrentDevice() const { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const { return 0; }
};
static const bool hooked = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);

// ---- Tensors here and their twins on the CPU

static bool is_here(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kHere.type(); }

static void check_type(c10::ScalarType type) {
  TORCH_CHECK_TYPE(type != c10::kDouble, "Cannot convert a tensor to float64: the pretended device has none, as MPS");
}

static Tensor shaped(Tensor tensor, const Tensor& like) {
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

static Tensor over(c10::Storage storage, const Tensor& like, c10::DispatchKey key) {
  c10::DispatchKeySet keys(key);
  return shaped(at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype()), like);
}

// A view keeps the keys of what it is of: in inference mode it would lose them otherwise.
static Tensor view(const Tensor& of, const Tensor& like) {
  c10::Storage storage(of.storage());
  auto kind = c10::TensorImpl::VIEW;
  return shaped(at::detail::make_tensor<c10::TensorImpl>(kind, std::move(storage), of.key_set(), like.dtype()), like);
}

// The CPU's view of a tensor's memory, which lives as long as the view.
static Tensor twin(const Tensor& tensor) {
  if (!is_here(tensor)) return tensor;
  auto* kept = new c10::Storage(tensor.storage());
  auto release = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
  c10::DataPtr data(kept->mutable_data(), kept, release, c10::Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), kept->nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  return over(std::move(storage), tensor, c10::DispatchKey::CPU);
}

static Tensor brought(const Tensor& tensor) {
  check_type(tensor.scalar_type());
  auto bytes = tensor.storage().nbytes();
  auto data = memory.allocate(bytes);
  if (bytes) std::memcpy(data.get(), tensor.storage().data(), bytes);
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), &memory, true);
  return over(std::move(storage), tensor, c10::DispatchKey::PrivateUse1);
}

// ---- Every operator

template <class Change>
static void change_tensors(IValue& value, Change change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    auto tensors = value.toTensorVector();
    for (auto& one : tensors) one = change(one);
    value = tensors;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> tensors;
    for (const auto& one : value.toOptionalTensorVector())
      tensors.push_back(one ? std::optional<Tensor>(change(*one)) : std::nullopt);
    value = tensors;
  }
}

static void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  bool here = false, elsewhere = false;
  std::vector<std::pair<Tensor, Tensor>> twins;      // ours, and its twin
  std::unordered_map<const void*, Tensor> memories;  // by address: a result there is a view of an argument
  for (auto& value : torch::jit::last(*stack, schema.arguments().size())) {
    if (value.isDevice() && value.toDevice().type() == kHere.type()) {
      here = true;
      const_cast<IValue&>(value) = c10::Device(c10::kCPU);
    }
    const bool indices = value.isOptionalTensorList();  // these may lie on the CPU, as numbers may
    change_tensors(const_cast<IValue&>(value), [&](const Tensor& tensor) {
      if (!is_here(tensor)) {
        elsewhere |= tensor.defined() && tensor.dim() > 0 && !indices;
        return tensor;
      }
      here = true;
      if (tensor.storage().data()) memories.emplace(tensor.storage().data(), tensor);
      twins.emplace_back(tensor, twin(tensor));
      return twins.back().second;
    });
  }
  TORCH_CHECK(!(here && elsewhere), "Expected all tensors to be on the same device, but found at least two devices, ",
              "pretended:0 and cpu! (", schema.name(), ")");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (auto& [ours, other] : twins) {  // what was resized, as outputs are
    if (other.storage().data() == ours.storage().data() && other.sizes() == ours.sizes()) continue;
    if (other.storage().data() != ours.storage().data())
      ours.unsafeGetTensorImpl()->set_storage_keep_dtype(brought(other).storage());
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
  }
  for (auto& value : torch::jit::last(*stack, schema.returns().size()))
    change_tensors(const_cast<IValue&>(value), [&](const Tensor& tensor) {
      if (!here || !tensor.defined() || is_here(tensor)) return tensor;
      for (auto& [ours, other] : twins)
        if (other.is_same(tensor)) return ours;
      auto found = memories.find(tensor.storage().data());
      return found == memories.end() ? brought(tensor) : view(found->second, tensor);
    });
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

// ---- What has to be said by itself: making, copying, reading, and convolutions, which PyTorch chooses by device

static Tensor empty(IntArrayRef size, std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
                    std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  auto chosen = type.value_or(c10::get_default_dtype_as_scalartype());
  check_type(chosen);
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), chosen, format);
}

static Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<c10::ScalarType> type,
                            std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  auto chosen = type.value_or(c10::get_default_dtype_as_scalartype());
  check_type(chosen);
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, chosen);
}

static Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  twin(to).copy_(twin(from));
  return to;
}

static Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

static at::Scalar number(const Tensor& tensor) { return twin(tensor).item(); }

static Tensor& set_storage(Tensor& tensor, c10::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return tensor;
}

static Tensor& set_whole_storage(Tensor& tensor, c10::Storage storage) {
  const int64_t numbers = storage.nbytes() / tensor.itemsize();
  return set_storage(tensor, std::move(storage), 0, {numbers}, {1});
}

static Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
                          IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                          int64_t groups) {
  TORCH_CHECK(is_here(x) == is_here(weight), "Input type and weight type should be the same (convolution)");
  std::optional<Tensor> other;
  if (bias && bias->defined()) other = twin(*bias);
  return brought(at::convolution(twin(x), twin(weight), other, stride, padding, dilation, transposed, output_padding,
                                 groups).contiguous());
}

static std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  std::vector<int64_t> bias{gradient.size(1)};
  auto [of_x, of_weight, of_bias] = at::convolution_backward(
      twin(gradient), twin(x), twin(weight), at::OptionalIntArrayRef(bias), stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  auto back = [](const Tensor& one) { return one.defined() ? brought(one.contiguous()) : one; };
  return {back(of_x), back(of_weight), back(of_bias)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", number);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}
