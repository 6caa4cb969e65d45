// Two pretended GPUs under torch's own dispatch key "CUDA", for a torch that was built without CUDA.
//
// Their memory is the host's, under addresses that the host can't follow: bit 61 is set, and whoever dereferences one dies. An
// operator without a kernel below reaches `run`. It checks where its tensors are, as CUDA's wrappers do; lets the processor
// compute on aliases of the device's memory; and puts what is new on the device. Nothing is fast, and there are no streams.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace {
using at::Tensor;
using c10::Device;
using c10::IValue;

constexpr int DEVICES = 2;
constexpr uintptr_t HIDDEN = uintptr_t(1) << 61;

// ---- What the tests set -------------------------------------------------------------------------------------------------
std::atomic<int64_t> limit{int64_t(8) << 30};  // bytes of each device
std::atomic<bool> has_float64{true};
// Operators whose CUDA wrapper checks no devices (TensorIterator does, or they look themselves), and those that have a kernel.
std::unordered_set<std::string> unchecked, known;

void require_format(c10::ScalarType type) {
  TORCH_CHECK_TYPE(has_float64 || type != at::kDouble, "Cannot convert a tensor to float64 dtype: the pretended GPU has none.");
}

// ---- Memory -------------------------------------------------------------------------------------------------------------
thread_local c10::DeviceIndex current = 0;

void* real(const void* hidden) {
  return hidden ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(hidden) & ~HIDDEN) : nullptr;
}

struct Counts {
  std::atomic<int64_t> used{0}, peak{0}, reserved{0};  // reserved: also what is kept for the next tensors
  std::atomic<int64_t> queued{0};                      // operators since the host last waited for the device
};
Counts counts[DEVICES];
// Of all devices: bytes and copies from and to the host, and how often the host waited.
std::atomic<int64_t> to_device{0}, to_host{0}, copies{0}, waits{0};

void wait_for(int device) {
  counts[device].queued = 0;
  ++waits;
}

void raise_to(std::atomic<int64_t>& most, int64_t value) {
  int64_t before = most;
  while (value > before && !most.compare_exchange_weak(before, value)) {}
}

struct Block {
  void* memory;
  int64_t size;
  int device;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  counts[block->device].used -= block->size;
  std::free(block->memory);
  delete block;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    Device device(c10::kCUDA, current);
    if (!size) return {nullptr, device};
    auto bytes = static_cast<int64_t>(size);
    auto& own = counts[current];
    if ((own.used += bytes) > limit) {
      own.used -= bytes;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", size, " bytes (pretended GPU).");
    }
    raise_to(own.peak, own.used);
    raise_to(own.reserved, own.used);
    void* memory = nullptr;
    TORCH_CHECK(!posix_memalign(&memory, 512, size), "no memory");
    std::memset(memory, 0xff, size);  // NaN: nothing may be read before it is written
    return {reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(memory) | HIDDEN), new Block{memory, bytes, current}, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t count) const override { std::memcpy(real(target), real(source), count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    for (auto& each : counts) each.reserved = each.used.load();
  }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = counts[device].used;
    stats.allocated_bytes[0].peak = counts[device].peak;
    stats.reserved_bytes[0].current = counts[device].reserved;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override { counts[device].peak = counts[device].used.load(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override { return {limit - counts[device].reserved, limit.load()}; }
};
Allocator allocator;

// ---- Each thread's present device, and what torch's CPU-only library asks of CUDA ---------------------------------------
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device getDevice() const override { return {c10::kCUDA, current}; }
  void setDevice(Device device) const override {
    if (!device.has_index()) return;
    TORCH_CHECK(device.index() < DEVICES, "CUDA error: invalid device ordinal");
    current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getDefaultStream(Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex device) const override { wait_for(device); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

at::Generator& generator_of(int index) {
  static std::array<at::Generator, DEVICES> all{at::detail::createCPUGenerator(1), at::detail::createCPUGenerator(1)};
  return all[index];
}

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return DEVICES; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    auto before = current;
    if (device >= 0) current = device;
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override { return generator_of(device < 0 ? current : device); }
  // The library has made its hooks before this file is loaded: they get the virtual functions of these.
  static void install() {
    static Hooks own;
    auto& there = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
    if (!there.hasCUDA()) std::memcpy(static_cast<void*>(&there), static_cast<const void*>(&own), sizeof(void*));
  }
};

// ---- Tensors on both sides ----------------------------------------------------------------------------------------------
// A tensor of the processor over the device's memory; it keeps nothing alive.
Tensor seen_by_host(const Tensor& tensor) {
  auto* storage = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  c10::Storage seen(c10::Storage::use_byte_size_t(), storage->nbytes(), {real(storage->data()), Device(c10::kCPU)}, nullptr, false);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(seen), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

Tensor new_strided(c10::IntArrayRef size, c10::IntArrayRef stride, c10::ScalarType type, std::optional<Device> device) {
  require_format(type);
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
}

Tensor on_device(const Tensor& value, Device device) {
  if (!value.defined() || !value.is_cpu()) return value;
  auto source = value.is_non_overlapping_and_dense() ? value : value.contiguous();
  // A number that became a tensor is float64 in torch, and takes the other operand's format.
  bool number = value.unsafeGetTensorImpl()->is_wrapped_number();
  if (!number) require_format(source.scalar_type());
  c10::OptionalDeviceGuard guard(device);
  Tensor made = at::detail::empty_strided_generic(
      source.sizes(), source.strides(), &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), source.scalar_type());
  seen_by_host(made).copy_(source);
  if (number) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

Tensor view_on_device(const Tensor& value, const Tensor& base) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), value.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(value.sizes(), value.strides(), value.storage_offset());
  return made;
}

// Call `each` with every tensor of an argument, and return the argument with what it returned in their places.
template <typename F>
IValue map_tensors(const IValue& value, F each) {
  if (value.isTensor()) return each(value.toTensor());
  if (value.isTensorList()) {
    std::vector<Tensor> all;
    for (const Tensor& one : value.toTensorVector()) all.push_back(each(one));
    return all;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> all;
    for (const std::optional<Tensor>& one : value.toOptionalTensorVector()) all.push_back(one ? std::optional<Tensor>(each(*one)) : std::nullopt);
    return all;
  }
  return value;
}

// ---- Operators ----------------------------------------------------------------------------------------------------------
bool takes_indices(const std::string& name) {
  for (const char* start : {"aten::index.", "aten::_index_put_impl_", "aten::index_put", "aten::_unsafe_index"})
    if (name.rfind(start, 0) == 0) return true;
  return false;
}

bool is_generator(const c10::Argument& argument) {
  auto optional = argument.type()->cast<c10::OptionalType>();
  return optional && optional->getElementType()->kind() == c10::TypeKind::GeneratorType;
}

// Return the device of an operator; raise where its tensors are on several, as CUDA does.
Device find_device(const std::string& name, const std::vector<c10::Argument>& arguments, const std::vector<IValue>& values) {
  std::optional<Device> target;
  for (const IValue& value : values) {
    map_tensors(value, [&](const Tensor& each) {
      if (each.defined() && each.is_cuda() && !target) target = each.device();
      return each;
    });
    if (value.isDevice() && value.toDevice().is_cuda() && !target)
      target = Device(c10::kCUDA, value.toDevice().has_index() ? value.toDevice().index() : current);
  }
  TORCH_CHECK(target, name, " has no argument on the device");
  for (size_t i = 0; i < values.size(); ++i)
    map_tensors(values[i], [&](const Tensor& each) {
      bool may_be_elsewhere = each.defined() && each.is_cpu() &&
          ((unchecked.count(name) && !each.dim()) || (values[i].isOptionalTensorList() && takes_indices(name)));
      TORCH_CHECK(!each.defined() || each.device() == *target || may_be_elsewhere,
          "Expected all tensors to be on the same device, but got ", arguments[i].name(), " is on ", each.device(),
          ", different from other tensors on ", *target, " (when checking argument in method ", name, ")");
      return each;
    });
  return *target;
}

// What CUDA's libraries lack.
void require_kernel(const std::string& name, const std::string& base, const std::vector<IValue>& values) {
  TORCH_CHECK_NOT_IMPLEMENTED(base.rfind("aten::", 0) != 0 || known.count(name),
      "Could not run '", name, "' with arguments from the 'CUDA' backend: it has no kernel for it.");
  static const std::unordered_set<std::string> products{
      "aten::mm", "aten::bmm", "aten::addmm", "aten::addmv", "aten::baddbmm", "aten::dot", "aten::addbmm"};
  for (const IValue& value : values) {
    TORCH_CHECK(!products.count(base) || !value.isTensor() || !value.toTensor().defined() ||
            !c10::isIntegralType(value.toTensor().scalar_type(), true), "\"", base, "_cuda\" not implemented for integers");
    TORCH_CHECK(base != "aten::linalg_lstsq" || !value.isString() || value.toStringRef() == "gels",
        "torch.linalg.lstsq: `driver` other than `gels` is not supported on CUDA");
  }
}

// Count an operator that isn't a view; and a copy and a wait, where CUDA's wrapper needs values of its results to go on.
void count_operator(const std::string& base, const std::vector<IValue>& given, int device) {
  ++counts[device].queued;
  static const std::unordered_set<std::string> waiting{
      "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
      "aten::unique_consecutive", "aten::bincount", "aten::_linalg_eigh", "aten::_linalg_svd", "aten::repeat_interleave"};
  if (waiting.count(base)) {
    to_host += base == "aten::_local_scalar_dense" ? given[0].toTensor().itemsize() : 8;
    ++copies;
    wait_for(device);
  }
  // The places of a mask; a single value fills it without. (``index`` looks them up by ``nonzero``, which is seen above.)
  if (base == "aten::_index_put_impl_" && given[2].toTensor().numel() != 1)
    map_tensors(given[1], [&](const Tensor& index) {
      if (index.scalar_type() == at::kBool) wait_for(device);
      return index;
    });
}

void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const size_t count = arguments.size(), begin = stack->size() - count;
  std::vector<IValue> given(stack->begin() + static_cast<int64_t>(begin), stack->end());
  require_kernel(name, schema.name(), given);
  Device target = find_device(name, arguments, given);
  const auto& returns = schema.returns();
  bool is_view = !returns.empty() && returns[0].alias_info() && !returns[0].alias_info()->isWrite();
  if (!is_view) count_operator(schema.name(), given, target.index());

  // The processor's view of the arguments.
  std::vector<std::pair<Tensor, Tensor>> filled, written;  // what an operator makes, or changes: (device's, processor's)
  for (size_t i = 0; i < count; ++i) {
    IValue& value = (*stack)[begin + i];
    bool writes = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    if (value.isDevice()) value = Device(c10::kCPU);
    TORCH_CHECK(!value.isGenerator(), "Expected a 'cuda' device type for generator (", name, ")");
    if (value.isNone() && is_generator(arguments[i])) value = generator_of(target.index());
    value = map_tensors(value, [&](const Tensor& each) {
      if (!each.defined() || !each.is_cuda()) return each;
      bool empty = writes && !each.numel();
      auto seen = empty ? at::empty(each.sizes(), each.options().device(c10::kCPU)) : seen_by_host(each);
      if (writes) (empty ? filled : written).emplace_back(each, seen);
      return seen;
    });
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (auto& [device, host] : filled) {
    if (device.sizes() != host.sizes()) device.resize_(host.sizes());
    if (host.numel()) seen_by_host(device).copy_(host);
  }
  for (auto& [device, host] : written)
    if (device.sizes() != host.sizes() || device.strides() != host.strides())
      device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());

  const size_t from = stack->size() - returns.size();
  for (size_t i = 0; i < returns.size(); ++i) {
    IValue& value = (*stack)[from + i];
    const auto* info = returns[i].alias_info();
    if (!info) {
      value = map_tensors(value, [&](const Tensor& each) { return on_device(each, target); });
      continue;
    }
    size_t source = 0;
    while (source < count && !(arguments[source].alias_info() && arguments[source].alias_info()->beforeSets() == info->beforeSets())) ++source;
    TORCH_CHECK(source < count && (info->isWrite() || value.isTensor()), name, ": the source of this alias is not known");
    value = info->isWrite() ? given[source] : IValue(view_on_device(value.toTensor(), given[source].toTensor()));
  }
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> type, std::optional<c10::Layout>, std::optional<Device> device,
             std::optional<bool> pinned, std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  require_format(c10::dtype_or_default(type));
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(type), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  return new_strided(size, stride, c10::dtype_or_default(type), device);
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below;
  for (const Tensor& each : {self, source}) TORCH_CHECK(each.is_cuda() || each.is_cpu(), "copy_ from or to ", each.device());
  Tensor target = self.is_cuda() ? seen_by_host(self) : self, origin = source.is_cuda() ? seen_by_host(source) : source;
  if (!target.numel() && !origin.numel()) return self;
  target.copy_(origin);
  int device = (self.is_cuda() ? self : source).device().index();
  ++counts[device].queued;
  if (self.is_cuda() && source.is_cuda()) return self;
  // The host converts: what it gets before it sends, and what it is sent afterwards.
  (self.is_cuda() ? to_device : to_host) += self.numel() * (self.is_cuda() ? self : source).itemsize();
  ++copies;
  // From memory that isn't pinned, CUDA takes what is to be copied without waiting.
  if (!non_blocking) wait_for(device);
  return self;
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() == size) return self;
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  size_t need = at::detail::computeStorageNbytesContiguous(size, self.itemsize(), self.storage_offset());
  if (need > storage->nbytes()) {
    c10::OptionalDeviceGuard guard(self.device());
    auto data = allocator.allocate(need);
    if (storage->nbytes()) std::memcpy(real(data.get()), real(storage->data()), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(need);
  }
  impl->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}
Tensor& set_whole(Tensor& self, at::Storage source) {
  auto size = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {size}, {1});
}
Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// The processor's histogram takes no integers; CUDA's does.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  return on_device(at::histc(seen_by_host(self).to(at::kFloat), bins, least, most).to(self.scalar_type()), self.device());
}

// The attention that always works (0); a GPU chooses another by format, mask and size.
int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("histc", histc);
  m.impl("_fused_sdp_choice", choose_attention);
}

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(c10::kCUDA, &allocator, 1);
  Hooks::install();
  m.def("describe", [](std::unordered_set<std::string> free, std::unordered_set<std::string> all) {
    unchecked = std::move(free);
    known = std::move(all);
  });
  m.def("count", [] { return DEVICES; });
  m.def("current", [] { return int(current); });
  m.def("choose", [](int device) {
    int before = current;
    TORCH_CHECK(device < DEVICES, "CUDA error: invalid device ordinal");
    if (device >= 0) current = static_cast<c10::DeviceIndex>(device);
    return before;
  });
  m.def("used", [](int device) { return counts[device].used.load(); });
  m.def("peak", [](int device) { return counts[device].peak.load(); });
  m.def("reserved", [](int device) { return counts[device].reserved.load(); });
  m.def("synchronize", [](int device) { wait_for(device); });
  m.def("queued", [] { return counts[0].queued + counts[1].queued; });
  m.def("traffic", [] {
    return std::unordered_map<std::string, int64_t>{{"to_device", to_device}, {"to_host", to_host}, {"copies", copies}, {"waits", waits}};
  });
  m.def("empty_cache", [] { allocator.emptyCache({0, 0}); });
  m.def("total", [] { return limit.load(); });
  m.def("set_limit", [](int64_t bytes) { limit = bytes; });
  m.def("set_float64", [](bool there) { has_float64 = there; });
  m.def("seed", [](int device, uint64_t seed) { generator_of(device).set_current_seed(seed); });
  m.def("state", [](int device) { return generator_of(device).get_state(); });
  m.def("set_state", [](int device, const Tensor& state) { generator_of(device).set_state(state); });
}
