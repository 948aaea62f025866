// A CPU allocator for torch that counts: bytes allocated now, and the largest number since the last question.
//
// CUDA's allocator keeps these two figures, the CPU's keeps none. Each block carries its size in a header of one
// alignment unit, so that data pointer and context stay the same pointer, as torch's own allocator has it. The header
// also holds the block's own address: that tells our blocks from memory that others mapped or allocated.

#include <atomic>
#include <cstdint>
#include <cstring>

#include <sys/mman.h>
#include <unistd.h>

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

constexpr size_t kHeader = 64; // torch aligns CPU memory to 64 bytes: the data behind the header stays aligned
struct Header {
  size_t nbytes;
  void* self;
};

std::atomic<int64_t> allocated{0};
std::atomic<int64_t> peak{0};

void count_up(int64_t nbytes) {
  const int64_t now = allocated.fetch_add(nbytes, std::memory_order_relaxed) + nbytes;
  int64_t seen = peak.load(std::memory_order_relaxed);
  while (now > seen && !peak.compare_exchange_weak(seen, now, std::memory_order_relaxed)) {
  }
}

void release(void* data) {
  if (data == nullptr) {
    return;
  }
  char* block = static_cast<char*>(data) - kHeader;
  Header header{};
  std::memcpy(&header, block, sizeof(header));
  allocated.fetch_sub(static_cast<int64_t>(header.nbytes), std::memory_order_relaxed);
  std::memset(block, 0, sizeof(header)); // a freed block must not be taken for a live one
  c10::free_cpu(block);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    void* data = nullptr;
    if (nbytes > 0) {
      char* block = static_cast<char*>(c10::alloc_cpu(nbytes + kHeader)); // throws when there is no memory
      data = block + kHeader;
      const Header header{nbytes, data};
      std::memcpy(block, &header, sizeof(header));
      count_up(static_cast<int64_t>(nbytes));
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* dest, const void* src, std::size_t count) const override {
    default_copy_data(dest, src, count);
  }
};

} // namespace

extern "C" {

// Blocks that were allocated before keep their own deleter and are never counted.
void qz3_install() {
  static CountingAllocator allocator; // lives as long as the process: tensors outlive every scope
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
}

// Whether the storage that begins at data is one of ours. Anything may be asked: a page that is not mapped is not ours.
int qz3_owns(void* data) {
  if (data == nullptr) {
    return 0;
  }
  char* block = static_cast<char*>(data) - kHeader;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  void* start = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(block) & ~(page - 1));
  if (msync(start, 1, MS_ASYNC) != 0) {
    return 0;
  }
  Header header{};
  std::memcpy(&header, block, sizeof(header));
  return header.self == data ? 1 : 0;
}

int64_t qz3_allocated_bytes() {
  return allocated.load(std::memory_order_relaxed);
}

int64_t qz3_take_peak_bytes() {
  const int64_t now = allocated.load(std::memory_order_relaxed);
  const int64_t seen = peak.exchange(now, std::memory_order_relaxed);
  return seen > now ? seen : now;
}

} // extern "C"
