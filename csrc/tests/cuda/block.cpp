#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

// The section of __shared__ variables, if there are any.
extern "C" {
extern char __start_dlvae_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_dlvae_shared[] __attribute__((weak, visibility("hidden")));
}

namespace dlvae::emulator {

Fiber* current;
dim3 block_index, block_size, grid_size;
void* shared_memory;

namespace {

constexpr int WARP = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / WARP;
// The most shared memory per block on the smallest GPUs that kernels are compiled for.
constexpr size_t MAX_SHARED_BYTES = 99 * 1024;

struct Warp {
  uint32_t live, ready, waiting;  // bit masks of lanes
};

struct Block {
  Body body;
  const void* kernel;
  int threads, live, at_barrier;
  uint32_t ready_warps;
  Warp warps[MAX_WARPS];
  // Runs from the last thread to the first, which reveals a dependence on the order.
  bool backwards;
  // Runs in a random order.
  bool is_shuffled;
  std::mt19937 random;
  std::exception_ptr error;
};

Block block;
Fiber* fibers[MAX_THREADS];
Fiber outside;  // the launching thread

int pick(uint32_t bits) {
  if (!block.is_shuffled) return block.backwards ? 31 - __builtin_clz(bits) : __builtin_ctz(bits);
  for (unsigned others = block.random() % __builtin_popcount(bits); others > 0; --others) bits &= bits - 1;
  return __builtin_ctz(bits);
}

void make_ready(int warp, uint32_t lanes) {
  block.warps[warp].ready |= lanes;
  if (lanes != 0) block.ready_warps |= 1u << warp;
}

// Returns a thread that can continue, or the launching thread. Unless shuffled, threads of the current warp come first.
Fiber* next() {
  if (block.ready_warps == 0 || block.error) return &outside;
  const bool stays = !block.is_shuffled && current != &outside && block.warps[current->warp].ready != 0;
  const int warp = stays ? current->warp : pick(block.ready_warps);
  Warp& lanes = block.warps[warp];
  const int lane = pick(lanes.ready);
  lanes.ready &= ~(1u << lane);
  if (lanes.ready == 0) block.ready_warps &= ~(1u << warp);
  return fibers[warp * WARP + lane];
}

void go_on(bool ends = false) {
  Fiber* const from = current;
  current = next();
  if (current != from) switch_fibers(from, current, ends);
}

void release_block() {
  block.at_barrier = 0;
  for (int warp = 0; warp * WARP < block.threads; ++warp) make_ready(warp, block.warps[warp].live);
}

// Runs the operation that a lane waits for if all lanes of its mask have arrived.
bool run_together(int warp, int lane) {
  Warp& lanes = block.warps[warp];
  Fiber* const* const of_warp = fibers + warp * WARP;
  const Fiber& one = *of_warp[lane];
  const uint32_t present = one.mask & lanes.live;
  if ((present & ~lanes.waiting) != 0) return false;
  void* brought[WARP] = {};
  for (int i = 0; i < WARP; ++i) {
    if ((present >> i & 1) == 0) continue;
    if (of_warp[i]->operation != one.operation || of_warp[i]->mask != one.mask) return false;
    brought[i] = of_warp[i]->operand;
  }
  one.operation(brought, present);
  lanes.waiting &= ~present;
  make_ready(warp, present);
  return true;
}

void end_thread() {
  Warp& lanes = block.warps[current->warp];
  lanes.live &= ~(1u << current->lane);
  --block.live;
  if (block.at_barrier > 0 && block.at_barrier == block.live) release_block();
  for (int lane = 0; lane < WARP; ++lane) {
    if (lanes.waiting >> lane & 1) run_together(current->warp, lane);
  }
}

void thread_main() {
  enter_fiber();
  try {
    block.body(block.kernel);
    end_thread();
  } catch (...) {
    block.error = std::current_exception();
  }
  go_on(/*ends=*/true);
  __builtin_unreachable();
}

std::string name_of(const Fiber& fiber) {
  const auto three = [](auto at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
  };
  return "thread " + three(fiber.thread) + " of block " + three(block_index);
}

// Lists all places where threads wait, each with its first waiting thread.
std::string waiting_threads() {
  std::string text;
  std::vector<const char*> places;
  for (int i = 0; i < block.threads; ++i) {
    const char* place = fibers[i]->waits_at;
    if (place == nullptr || std::find(places.begin(), places.end(), place) != places.end()) continue;
    places.push_back(place);
    text += (text.empty() ? "" : "; ") + name_of(*fibers[i]) + " waits at " + place;
  }
  return text;
}

void start(int number) {
  if (fibers[number] == nullptr) fibers[number] = new_fiber();
  Fiber& fiber = *fibers[number];
  const unsigned at = static_cast<unsigned>(number), across = block_size.x * block_size.y;
  fiber.thread = {at % block_size.x, at % across / block_size.x, at / across};
  fiber.number = number;
  fiber.warp = number / WARP;
  fiber.lane = number % WARP;
  fiber.waits_at = nullptr;
  fiber.copies.clear();
  fiber.groups = 0;
  prepare_fiber(&fiber, thread_main);
}

void run_block() {
  block.live = block.threads;
  block.at_barrier = 0;
  block.ready_warps = 0;
  block.backwards = !block.backwards;
  for (int warp = 0; warp * WARP < block.threads; ++warp) {
    const int lanes = std::min(WARP, block.threads - warp * WARP);
    const uint32_t all = lanes == WARP ? ~0u : (1u << lanes) - 1;
    block.warps[warp] = {all, 0, 0};
    make_ready(warp, all);
  }
  for (int i = 0; i < block.threads; ++i) start(i);
  current = &outside;
  go_on();
  if (block.error) std::rethrow_exception(block.error);
  if (block.live > 0) throw std::runtime_error("no thread can go on: " + waiting_threads());
}

// Returns all blocks of a grid in the order in which they run.
std::vector<size_t> order_of_blocks(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  if (block.is_shuffled) std::shuffle(order.begin(), order.end(), block.random);
  return order;
}

void check_limits(dim3 grid, size_t shared_bytes) {
  const size_t threads = static_cast<size_t>(block_size.x) * block_size.y * block_size.z;
  const auto check = [](bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(what);
  };
  check(threads >= 1 && threads <= MAX_THREADS && block_size.z <= 64, std::to_string(threads) + " threads in a block");
  check(grid.x <= INT32_MAX && grid.y <= 65535 && grid.z <= 65535, "too many blocks");
  check(shared_bytes <= MAX_SHARED_BYTES, std::to_string(shared_bytes) + " bytes of shared memory");
}

}  // namespace

void wait_for_block() {
  if (++block.at_barrier == block.live) release_block();
  current->waits_at = "__syncthreads";
  go_on();
  current->waits_at = nullptr;
}

void wait_for_lanes(const char* name, uint32_t mask, Together operation, void* operand) {
  Fiber& self = *current;
  if ((mask >> self.lane & 1) == 0) fail(std::string(name) + ": its own lane is not in the mask");
  self.operation = operation;
  self.mask = mask;
  self.operand = operand;
  self.waits_at = name;
  block.warps[self.warp].waiting |= 1u << self.lane;
  run_together(self.warp, self.lane);
  go_on();
  self.waits_at = nullptr;
}

void fail(const std::string& what) { throw std::runtime_error(name_of(*current) + ": " + what); }

void run(const char* name, dim3 grid, dim3 block_shape, size_t shared_bytes, Body body, const void* kernel) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  block_size = block_shape;
  grid_size = grid;
  block.body = body;
  block.kernel = kernel;
  block.threads = static_cast<int>(block_size.x * block_size.y * block_size.z);
  block.error = nullptr;
  // The order is the same at each launch, whatever ran before.
  const char* const seed = std::getenv("DLVAE_EMULATED_ORDER");
  block.is_shuffled = seed != nullptr && *seed != '\0';
  if (block.is_shuffled) block.random.seed(static_cast<unsigned>(std::strtoul(seed, nullptr, 10)));
  try {
    check_limits(grid, shared_bytes);
    const std::unique_ptr<void, void (*)(void*)> memory(
        ::operator new(shared_bytes, std::align_val_t(128)),
        [](void* bytes) { ::operator delete(bytes, std::align_val_t(128)); });
    shared_memory = memory.get();
    const size_t across = grid.x, layer = across * grid.y;
    for (const size_t i : order_of_blocks(layer * grid.z)) {
      block_index = dim3(i % across, i % layer / across, i / layer);
      std::memset(shared_memory, 0xff, shared_bytes);
      std::memset(__start_dlvae_shared, 0xff, __stop_dlvae_shared - __start_dlvae_shared);
      run_block();
    }
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string("kernel ") + name + ": " + error.what());
  }
}

}  // namespace dlvae::emulator
