#include "emulator.h"

#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fibre.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fedlora::emulator {
namespace {

constexpr unsigned kThreads = 1024;  // of a block, on every device
constexpr unsigned kCluster = 8;     // blocks, without asking for more
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGuard = 0;  // the sanitizer has red zones of its own
#else
constexpr size_t kGuard = 256;  // bytes on either side of shared memory
#endif
constexpr unsigned char kGuardByte = 0xA5;
constexpr Site kEnd = {"the end of the kernel", "", 0};

uint64_t first_seed() {
  const char* text = std::getenv("FEDLORA_EMULATOR_SEED");
  return text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
}

cuda::Device present_device = kH200;
uint64_t present_seed = first_seed();
uint64_t state = 0;

// xorshift64*: quick, and good enough to draw orders from.
uint32_t draw() {
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return static_cast<uint32_t>(state * 0x2545F4914F6CDD1DULL >> 32);
}

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  size_t group;
};

struct Warp;

struct Lane {
  Fibre fibre;
  Warp* warp;
  dim3 thread;
  int index;
  size_t groups;
  std::vector<Copy> copies;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Block {
  std::vector<Warp> warps;
  std::unique_ptr<char, Free> memory;
  char* shared;
  dim3 index;
  unsigned rank;
  unsigned arrived;
};

struct Warp {
  Lane lanes[kWarp];
  Block* block;
  unsigned arrived;
  unsigned first;  // the order of this round: lane (first + i * step) % 32
  unsigned step;
  unsigned round;
  Site site;
  void* arguments[2][kWarp];
  uint64_t values[2][kWarp];

  Lane& next() { return lanes[(first + arrived * step) % kWarp]; }
  void shuffle() {
    const uint32_t drawn = draw();
    first = drawn % kWarp;
    step = (drawn >> 8) | 1U;
    arrived = 0;
  }
};

std::vector<Block> blocks;     // of the cluster that runs
std::vector<Warp*> runnable;   // those that no lane of has been resumed since they met
unsigned cluster_arrived = 0;  // warps
unsigned finished = 0;         // warps
unsigned warps_of_block = 0;
size_t shared_bytes = 0;
const std::function<void()>* body = nullptr;
Lane* current = nullptr;
Fibre outside;
std::string failure;

std::string text(const Site& site) {
  std::string place = site.what;
  if (site.line == 0) return place;
  const std::string file = site.file;
  return place + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line) + ")";
}

bool same(const Site& left, const Site& right) {
  return left.line == right.line && left.what == right.what;
}

std::string text(const dim3& index) {
  std::string result = "(";
  result += std::to_string(index.x) + ", " + std::to_string(index.y) + ", ";
  return result + std::to_string(index.z) + ")";
}

// Messages are put together here: what fail() is called from never cleans up after itself.
std::string stuck() {
  std::string waiting;
  for (const Block& block : blocks) {
    for (const Warp& warp : block.warps) {
      const std::string place = text(warp.site);
      if (waiting.find(place) != std::string::npos) continue;
      waiting += (waiting.empty() ? "warp " : "; warp ") +
                 std::to_string(&warp - block.warps.data()) + " of block " + text(block.index) +
                 " at " + place;
    }
  }
  return "a barrier that not all threads reach: " + waiting;
}

std::string parted(const char* whose, const Block& block, const Site& one, const Site& other) {
  return whose + std::string(" of block ") + text(block.index) + " part: at " + text(one) +
         " and at " + text(other);
}

void go(Lane& to) {
  Lane& from = *current;
  if (&from == &to) return;
  current = &to;
  threadIdx = to.thread;
  blockIdx = to.warp->block->index;
  resume(from.fibre, to.fibre);
}

void begin() {
  arrived();
  (*body)();
  meet_block(kEnd);  // never returns: finished warps are not continued
}

// Continues any warp that may go on.
void dispatch() {
  if (runnable.empty()) fail(stuck());
  const size_t chosen = draw() % runnable.size();
  Warp* warp = runnable[chosen];
  runnable[chosen] = runnable.back();
  runnable.pop_back();
  go(warp->next());
}

void release(Block& block) {
  block.arrived = 0;
  for (Warp& warp : block.warps) runnable.push_back(&warp);
}

// Counts the present lane in. True for the last of its warp; others return when they are resumed.
bool last_of_warp(const Site& site) {
  Warp& warp = *current->warp;
  if (warp.arrived == 0) {
    warp.site = site;
  } else if (!same(warp.site, site)) {
    fail(parted("lanes of a warp", *warp.block, site, warp.site));
  }
  if (++warp.arrived < kWarp) {
    go(warp.next());
    return false;
  }
  warp.shuffle();
  return true;
}

void start(Block& block, unsigned threads) {
  for (Warp& warp : block.warps) {
    warp.block = &block;
    warp.round = 0;
    warp.shuffle();
    for (Lane& lane : warp.lanes) {
      lane.groups = 0;
      lane.copies.clear();
      prepare(lane.fibre, begin);
    }
  }
  block.arrived = 0;
  std::memset(block.shared, 0xFF, shared_bytes);  // every float type reads this as NaN
  blockDim = dim3(threads);
}

void check_guards(const Block& block) {
  for (size_t i = 0; i < kGuard; ++i) {
    const auto before = static_cast<unsigned char>(block.memory.get()[i]);
    const auto behind = static_cast<unsigned char>(block.shared[shared_bytes + i]);
    if (before != kGuardByte || behind != kGuardByte) {
      throw std::runtime_error("block " + text(block.index) + " wrote outside its " +
                               std::to_string(shared_bytes) + " bytes of shared memory");
    }
  }
}

// Blocks for a launch: their lanes, stacks and shared memory.
void allocate(const Launch& launch) {
  warps_of_block = static_cast<unsigned>(launch.threads) / kWarp;
  shared_bytes = launch.shared_bytes;
  blocks.clear();
  blocks.resize(static_cast<size_t>(launch.cluster));
  size_t fibre = 0;
  for (Block& block : blocks) {
    block.rank = static_cast<unsigned>(&block - blocks.data());
    block.warps.resize(warps_of_block);
    unsigned thread = 0;
    for (Warp& warp : block.warps) {
      for (Lane& lane : warp.lanes) {
        lane.index = static_cast<int>(thread % kWarp);
        lane.thread = dim3(thread++, 0, 0);
        lane.warp = &warp;
        give_stack(lane.fibre, fibre++);
      }
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared_bytes + 2 * kGuard) != 0) throw std::bad_alloc();
    block.memory.reset(static_cast<char*>(memory));
    block.shared = block.memory.get() + kGuard;
    std::memset(memory, kGuardByte, shared_bytes + 2 * kGuard);
  }
}

// One cluster: all its threads until the last has ended.
void run_blocks(const Launch& launch, unsigned first) {
  runnable.clear();
  cluster_arrived = 0;
  finished = 0;
  for (Block& block : blocks) {
    const unsigned number = first + block.rank;
    block.index = dim3(number % launch.grid.x, number / launch.grid.x % launch.grid.y,
                       number / launch.grid.x / launch.grid.y);
    start(block, static_cast<unsigned>(launch.threads));
    release(block);
  }
  Warp* warp = runnable[draw() % runnable.size()];
  std::erase(runnable, warp);
  current = &warp->next();
  threadIdx = current->thread;
  blockIdx = warp->block->index;
  outside = {};
  resume(outside, current->fibre);
  if (!failure.empty()) throw std::runtime_error(std::exchange(failure, {}));
  for (const Block& block : blocks) check_guards(block);
}

void check(const Launch& launch) {
  const auto refuse = [](const std::string& message) { throw std::runtime_error(message); };
  if (launch.threads < kWarp || launch.threads % kWarp != 0 ||
      launch.threads > static_cast<int>(kThreads)) {
    refuse("a block of " + std::to_string(launch.threads) + " threads");
  }
  if (launch.shared_bytes > present_device.shared_per_block) {
    refuse(std::to_string(launch.shared_bytes) + " bytes of shared memory, the device has " +
           std::to_string(present_device.shared_per_block));
  }
  const dim3& grid = launch.grid;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFU || grid.y > 0xFFFFU ||
      grid.z > 0xFFFFU) {
    refuse("a grid of " + text(grid) + " blocks");
  }
  const auto cluster = static_cast<unsigned>(launch.cluster);
  if (cluster > 1 && present_device.capability < 90) refuse("the device has no clusters");
  if (cluster == 0 || cluster > kCluster || grid.x % cluster != 0) {
    refuse("clusters of " + std::to_string(cluster) + " in a grid of " + text(grid) + " blocks");
  }
}

}  // namespace

void fail(std::string message) {
  failure = std::move(message);
  Lane& from = *current;
  resume(from.fibre, outside);
  std::abort();  // a thread that failed is not continued
}

void run(const Launch& launch, const std::function<void()>& thread) {
  static std::mutex one;
  const std::lock_guard lock(one);
  check(launch);
  state = present_seed * 0x9E3779B97F4A7C15ULL + 0xD1B54A32D192ED03ULL;
  body = &thread;
  gridDim = launch.grid;
  allocate(launch);
  // Blocks in any order: from a random one on, by a step that shares no factor with their number.
  const auto cluster = static_cast<unsigned>(launch.cluster);
  const uint64_t count = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z / cluster;
  const uint64_t begin_at = draw() % count;
  const uint64_t step = count % 7919 == 0 ? 1 : 7919;
  for (uint64_t i = 0; i < count; ++i) {
    run_blocks(launch, static_cast<unsigned>((begin_at + i * step) % count) * cluster);
  }
}

void meet_block(const Site& site) {
  if (!last_of_warp(site)) return;
  Block& block = *current->warp->block;
  const bool end = site.line == 0;
  if (++block.arrived < warps_of_block) return dispatch();
  for (const Warp& warp : block.warps) {
    if (!same(warp.site, site)) fail(parted("warps", block, site, warp.site));
  }
  if (!end) {
    release(block);
  } else if (++finished == blocks.size()) {
    resume(current->fibre, outside);
  }
  dispatch();
}

void meet_cluster(const Site& site) {
  if (!last_of_warp(site)) return;
  if (++cluster_arrived == blocks.size() * warps_of_block) {
    cluster_arrived = 0;
    for (Block& block : blocks) {
      for (const Warp& warp : block.warps) {
        if (!same(warp.site, site)) fail(parted("warps of the cluster", block, site, warp.site));
      }
      release(block);
    }
  }
  dispatch();
}

void* const* meet_warp(const Site& site, void* argument, Act act) {
  Warp& warp = *current->warp;
  void** arguments = warp.arguments[warp.round % 2];
  arguments[current->index] = argument;
  if (last_of_warp(site)) {
    ++warp.round;
    if (act != nullptr) act(arguments);
    go(warp.next());
  }
  return arguments;
}

const uint64_t* exchange(const Site& site, uint64_t value) {
  Warp& warp = *current->warp;
  uint64_t* values = warp.values[warp.round % 2];
  values[current->index] = value;
  if (last_of_warp(site)) {
    ++warp.round;
    go(warp.next());
  }
  return values;
}

int lane() { return current->index; }
unsigned block_in_cluster() { return current->warp->block->rank; }
unsigned blocks_in_cluster() { return static_cast<unsigned>(blocks.size()); }

char* shared_of(unsigned block) {
  if (block >= blocks.size()) fail("the cluster has no block " + std::to_string(block));
  return blocks[block].shared;
}

void copy_later(void* to, const void* from, size_t bytes) {
  current->copies.push_back({to, from, bytes, current->groups});
}

void copy_commit() { ++current->groups; }

void copy_wait(size_t newest) {
  std::vector<Copy>& copies = current->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group + newest < current->groups; ++done) {
    std::memcpy(copies[done].to, copies[done].from, copies[done].bytes);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

Setting::Setting(const cuda::Device& device, uint64_t seed)
    : device_(std::exchange(present_device, device)), seed_(std::exchange(present_seed, seed)) {}

Setting::~Setting() {
  present_device = device_;
  present_seed = seed_;
}

}  // namespace fedlora::emulator

namespace fedlora::cuda {

const Device& device() { return emulator::present_device; }

}  // namespace fedlora::cuda
