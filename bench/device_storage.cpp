// The three kinds with device memory, and their floors. See device_storage.hpp.
//
// One thread. A view of device memory is plain host memory: it is copied outside of what is timed.
#include "device_storage.hpp"

#include <cstring>

#include "cuda.hpp"
#include "host_storage.hpp"
#include "stats.hpp"

namespace refit::bench {
namespace {

CUdeviceptr device_address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

/// One way to copy, which is the only one: a driver has no choice to offer.
class DriverFloor : public Floor {
 public:
  DriverFloor(std::shared_ptr<Cuda> cuda, std::string name)
      : cuda_(std::move(cuda)), name_(std::move(name)) {}

  Result<Calibration> calibrate(int rounds) override {
    Samples samples;
    for (int i = 0; i < rounds; ++i) {
      REFIT_TRY_ASSIGN(const double seconds, copy());
      samples.push_back(seconds);
    }
    return Calibration{name_, smallest(samples), {{name_, median(samples)}}};
  }
  Result<double> copy() override {
    Result<void> done;
    // cuMemcpyDtoD may return before the device has copied.
    const double seconds = seconds_of([&] {
      done = copy_with(*cuda_);
      if (done) done = check(cuda_->cuCtxSynchronize(), "cuCtxSynchronize");
    });
    if (!done) return Unexpected(std::move(done).error());
    return seconds;
  }

 private:
  virtual Result<void> copy_with(Cuda& cuda) = 0;
  std::shared_ptr<Cuda> cuda_;
  std::string name_;
};

// ---- all of it on the device

class DeviceFloor final : public DriverFloor {
 public:
  DeviceFloor(std::shared_ptr<Cuda> cuda, CUdeviceptr to, CUdeviceptr from, std::uint64_t bytes)
      : DriverFloor(std::move(cuda), "cuMemcpyDtoD"), to_(to), from_(from), bytes_(bytes) {}

 private:
  Result<void> copy_with(Cuda& cuda) override {
    REFIT_BENCH_TRY_CUDA(cuda, cuMemcpyDtoD, to_, from_, bytes_);
    return {};
  }
  CUdeviceptr to_, from_;
  std::uint64_t bytes_;
};

class DeviceStorage final : public Storage {
 public:
  DeviceStorage(Side given, std::shared_ptr<Cuda> cuda, DeviceBuffer buffer)
      : Storage(std::move(given)), cuda_(std::move(cuda)), buffer_(std::move(buffer)) {
    bytes_ = std::make_unique_for_overwrite<std::byte[]>(side().layout.bytes);
    lie_at(buffer_.pointer(), bytes_.get());
  }
  static Result<std::unique_ptr<Storage>> allocate(Side side, std::shared_ptr<Cuda> cuda,
                                                   Sharing sharing) {
    REFIT_TRY_ASSIGN(DeviceBuffer buffer, DeviceBuffer::allocate(cuda, sharing, side.layout.bytes));
    auto made = std::make_unique<DeviceStorage>(std::move(side), cuda, std::move(buffer));
    REFIT_TRY_ASSIGN(auto region,
                     DeviceMemory::share(made->address(), made->buffer_.bytes(), kTensorLabel));
    REFIT_TRY_ASSIGN(auto fence, DeviceFence::behind(*region, cuda->stream()));
    made->register_in(std::move(region), std::move(fence));
    return made;
  }
  ~DeviceStorage() override { register_in(nullptr); }

  Result<void> write() override {
    REFIT_BENCH_TRY_CUDA(*cuda_, cuMemcpyHtoD, buffer_.address(), view().data, side().layout.bytes);
    return {};
  }
  Result<void> read() override {
    REFIT_BENCH_TRY_CUDA(*cuda_, cuMemcpyDtoH, view().data, buffer_.address(), side().layout.bytes);
    return {};
  }
  Result<Address> share() override {
    REFIT_TRY_ASSIGN(auto shared, buffer_.share());
    shared_fd_ = std::move(shared.second);
    return Address{std::move(shared.first), shared_fd_.get()};
  }
  Result<std::unique_ptr<Floor>> floor_from(const Storage& source, std::uint64_t bytes) override {
    return std::make_unique<DeviceFloor>(cuda_, buffer_.address(), device_address(source.address()),
                                         bytes);
  }

 private:
  std::shared_ptr<Cuda> cuda_;
  DeviceBuffer buffer_;
  std::unique_ptr<std::byte[]> bytes_;
  UniqueFd shared_fd_;
};

class DeviceKind final : public MemoryKind {
 public:
  DeviceKind(std::shared_ptr<Cuda> cuda, Sharing sharing)
      : cuda_(std::move(cuda)), sharing_(sharing) {}
  Result<std::unique_ptr<Storage>> source(Side side) override {
    return DeviceStorage::allocate(std::move(side), cuda_, sharing_);
  }
  Result<std::unique_ptr<Storage>> target(Side side) override { return source(std::move(side)); }
  Result<std::unique_ptr<Storage>> map_target(Side side, const nlohmann::json& how,
                                              UniqueFd fd) override {
    REFIT_TRY_ASSIGN(DeviceBuffer buffer, DeviceBuffer::open(cuda_, how, std::move(fd)));
    return std::make_unique<DeviceStorage>(std::move(side), cuda_, std::move(buffer));
  }

 private:
  std::shared_ptr<Cuda> cuda_;
  Sharing sharing_;
};

// ---- an engine that offloads: all of it on the host, and every other layer on the device too

struct ResidentLayer {
  std::uint32_t index = 0;
  Extent host;
  std::uint64_t pool_offset = 0;
};

/// Every other layer, one after the other in the pool.
std::vector<ResidentLayer> resident_layers(const Side& side) {
  std::vector<ResidentLayer> resident;
  std::uint64_t end = 0;
  for (std::uint32_t i = 0; i < side.layers.size(); i += 2) {
    resident.push_back({i, side.layers[i], end});
    end += rounded_to(side.layers[i].bytes, kPackedAlignBytes);
  }
  return resident;
}

class OffloadFloor final : public DriverFloor {
 public:
  OffloadFloor(std::shared_ptr<Cuda> cuda, std::byte* host, CUdeviceptr pool, CUdeviceptr from,
               std::uint64_t host_bytes, std::uint64_t pool_bytes)
      : DriverFloor(std::move(cuda), "cuMemcpyDtoH, cuMemcpyDtoD of the resident layers"),
        host_(host),
        pool_(pool),
        from_(from),
        host_bytes_(host_bytes),
        pool_bytes_(pool_bytes) {}

 private:
  Result<void> copy_with(Cuda& cuda) override {
    REFIT_BENCH_TRY_CUDA(cuda, cuMemcpyDtoH, host_, from_, host_bytes_);
    REFIT_BENCH_TRY_CUDA(cuda, cuMemcpyDtoD, pool_, from_, pool_bytes_);
    return {};
  }
  std::byte* host_;
  CUdeviceptr pool_, from_;
  std::uint64_t host_bytes_, pool_bytes_;
};

class OffloadStorage final : public Storage {
 public:
  OffloadStorage(Side given, std::shared_ptr<Cuda> cuda, HostBytes host, PinnedRange pinned,
                 DeviceBuffer pool)
      : Storage(std::move(given)),
        cuda_(std::move(cuda)),
        host_(std::move(host)),
        pinned_(std::move(pinned)),
        pool_(std::move(pool)),
        resident_(resident_layers(side())) {
    lie_at(host_.data(), host_.data());
  }
  static Result<std::unique_ptr<Storage>> allocate(Side side, const std::shared_ptr<Cuda>& cuda) {
    if (side.layers.size() < 2) {
      return fail(Errc::bad_argument,
                  "--memory offload needs a manifest with \"offload\": {\"layer_lists\": [...]} "
                  "that names the lists of layers");
    }
    const ResidentLayer last = resident_layers(side).back();
    REFIT_TRY_ASSIGN(HostBytes host, HostBytes::allocate(side.layout.bytes));
    REFIT_TRY_ASSIGN(PinnedRange pinned, PinnedRange::make(cuda, host.data(), host.bytes()));
    REFIT_TRY_ASSIGN(DeviceBuffer pool, DeviceBuffer::allocate(cuda, Sharing::legacy,
                                                               last.pool_offset + last.host.bytes));
    auto made = std::make_unique<OffloadStorage>(std::move(side), cuda, std::move(host),
                                                 std::move(pinned), std::move(pool));
    REFIT_TRY_ASSIGN(made->pool_region_,
                     DeviceMemory::share(made->pool_.pointer(), made->pool_.bytes(), kTensorLabel));
    REFIT_TRY_ASSIGN(auto fence, DeviceFence::behind(*made->pool_region_, cuda->stream()));
    made->register_in(made->host_.region(), std::move(fence));
    return made;
  }
  ~OffloadStorage() override { register_in(nullptr); }

  Result<void> write() override {
    for (const ResidentLayer& layer : resident_) {
      REFIT_BENCH_TRY_CUDA(*cuda_, cuMemcpyHtoD, pool_.address() + layer.pool_offset,
                           view().data + layer.host.offset, layer.host.bytes);
    }
    return {};
  }
  Result<void> read() override {
    std::vector<std::byte> found;
    for (const ResidentLayer& layer : resident_) {
      found.resize(layer.host.bytes);
      REFIT_BENCH_TRY_CUDA(*cuda_, cuMemcpyDtoH, found.data(), pool_.address() + layer.pool_offset,
                           found.size());
      REFIT_TRY(compare(found, layer.host.offset));
    }
    return {};
  }
  Result<Address> share() override {
    REFIT_TRY_ASSIGN(auto pool, pool_.share());
    Address address = host_.share();
    address.how["pool"] = std::move(pool.first);
    return address;
  }
  Result<std::unique_ptr<Floor>> floor_from(const Storage& source, std::uint64_t bytes) override {
    std::uint64_t resident_bytes = 0;
    for (const ResidentLayer& layer : resident_) resident_bytes += layer.host.bytes;
    return std::make_unique<OffloadFloor>(cuda_, host_.data(), pool_.address(),
                                          device_address(source.address()), bytes, resident_bytes);
  }

 private:
  /// The tensors of a layer that begins at `first` of the host place. What lies between them is
  /// nobody's: only the floor writes it.
  Result<void> compare(const std::vector<std::byte>& layer, std::uint64_t first) const {
    for (std::size_t i = 0; i < side().tensors.size(); ++i) {
      const std::uint64_t offset = side().layout.offsets[i];
      const ModelTensor& tensor = side().tensors[i];
      if (offset < first || offset + tensor.bytes > first + layer.size()) continue;
      if (std::memcmp(layer.data() + offset - first, view().data + offset, tensor.bytes) != 0) {
        return fail(Errc::digest_mismatch,
                    "the device place of '" + tensor.name + "' holds other bytes than the host's");
      }
    }
    return {};
  }
  Result<void> begin(ModuleSpec& module) const override {
    for (const Extent& layer : side().layers) {
      REFIT_TRY(module.add_layer_buffer(host_.region(), host_.data() + layer.offset, layer.bytes));
    }
    module.add_pool(pool_region_);
    return {};
  }
  Result<void> complete(ModuleSpec& module) const override {
    Residency::Move move = module.residency()->move();
    for (const ResidentLayer& layer : resident_)
      REFIT_TRY(move.resident(layer.index, pool_.pointer() + layer.pool_offset));
    return {};
  }

  std::shared_ptr<Cuda> cuda_;
  HostBytes host_;
  PinnedRange pinned_;
  DeviceBuffer pool_;
  std::vector<ResidentLayer> resident_;
  std::shared_ptr<DeviceMemory> pool_region_;
};

class OffloadKind final : public MemoryKind {
 public:
  explicit OffloadKind(std::shared_ptr<Cuda> cuda) : cuda_(std::move(cuda)) {}
  Result<std::unique_ptr<Storage>> source(Side side) override {
    return DeviceStorage::allocate(std::move(side), cuda_, Sharing::legacy);
  }
  Result<std::unique_ptr<Storage>> target(Side side) override {
    return OffloadStorage::allocate(std::move(side), cuda_);
  }
  Result<std::unique_ptr<Storage>> map_target(Side side, const nlohmann::json& how,
                                              UniqueFd fd) override {
    REFIT_TRY_ASSIGN(HostBytes host, HostBytes::map(how, std::move(fd)));
    REFIT_TRY_ASSIGN(PinnedRange pinned, PinnedRange::make(cuda_, host.data(), host.bytes()));
    REFIT_TRY_ASSIGN(DeviceBuffer pool, DeviceBuffer::open(cuda_, how.at("pool"), UniqueFd()));
    return std::make_unique<OffloadStorage>(std::move(side), cuda_, std::move(host),
                                            std::move(pinned), std::move(pool));
  }

 private:
  std::shared_ptr<Cuda> cuda_;
};

}  // namespace

Result<std::unique_ptr<MemoryKind>> make_device_kind(const std::string& name) {
  REFIT_TRY_ASSIGN(std::shared_ptr<Cuda> cuda, Cuda::open());
  if (name == "cuda") return std::make_unique<DeviceKind>(std::move(cuda), Sharing::legacy);
  if (name == "cuda-vmm") return std::make_unique<DeviceKind>(std::move(cuda), Sharing::vmm);
  if (name == "offload") return std::make_unique<OffloadKind>(std::move(cuda));
  return fail(Errc::bad_argument, "no memory kind is called '" + name + "'");
}

}  // namespace refit::bench
