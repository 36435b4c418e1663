// The block emulator itself: what kernels are proved with has to be right first.
#include <doctest/doctest.h>

#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "cuda/device.cuh"

namespace fedlora::tests {
namespace {

using namespace fedlora::cuda;
using emulator::kA100;
using emulator::kH200;
using emulator::Setting;

constexpr unsigned kAll = 0xFFFFFFFFU;

std::string message_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool mentions(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Every thread writes its neighbour's number, through shared memory.
__global__ void neighbour(int* out, bool barrier) {
  int* shared = shared_memory<int>();
  const unsigned i = threadIdx.x;
  shared[i] = static_cast<int>(i);
  if (barrier) __syncthreads();
  out[blockIdx.x * blockDim.x + i] = shared[(i + 33) % blockDim.x];
}

std::vector<int> neighbours(bool barrier, uint64_t seed) {
  const Setting setting(kH200, seed);
  std::vector<int> out(3 * 128);
  launch(neighbour, 3, 128, 128 * sizeof(int), Stream{}, out.data(), barrier);
  return out;
}

TEST_CASE("a barrier orders writes and reads, and a missing one shows") {
  std::vector<int> expected(3 * 128);
  for (int i = 0; i < 3 * 128; ++i) expected[i] = (i + 33) % 128;
  std::set<std::vector<int>> seen;
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    CHECK(neighbours(true, seed) == expected);
    const std::vector<int> wrong = neighbours(false, seed);
    CHECK(wrong != expected);
    seen.insert(wrong);
  }
  CHECK(seen.size() == 8);
  CHECK(neighbours(false, 3) == neighbours(false, 3));
}

__global__ void shuffles(double* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  double value = lane;
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  double* to = out + threadIdx.x * 6;
  to[0] = value;
  to[1] = __shfl_sync(kAll, lane + 0.5, 7);
  to[2] = __shfl_down_sync(kAll, lane, 3);
  to[3] = __shfl_sync(kAll, int64_t{1} << lane, 2, 8);
  to[4] = __ballot_sync(kAll, lane % 3 == 0);
  to[5] = __shfl_up_sync(kAll, static_cast<float>(lane), 1);
}

TEST_CASE("shuffles and ballots") {
  std::vector<double> out(64 * 6);
  launch(shuffles, 1, 64, 0, Stream{}, out.data());
  unsigned thirds = 0;
  for (unsigned i = 0; i < 32; i += 3) thirds |= 1U << i;
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32;
    const double* from = out.data() + i * 6;
    CHECK(from[0] == 31 * 16);
    CHECK(from[1] == 7.5);
    CHECK(from[2] == (lane + 3 < 32 ? lane + 3 : lane));
    CHECK(from[3] == static_cast<double>(int64_t{1} << (lane / 8 * 8 + 2)));
    CHECK(from[4] == thirds);
    CHECK(from[5] == (lane > 0 ? lane - 1 : 0));
  }
}

__global__ void within_warps(int* out, bool barrier) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (barrier) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1U];
}

TEST_CASE("a missing __syncwarp shows") {
  std::vector<int> expected(64);
  for (int i = 0; i < 64; ++i) expected[i] = i ^ 1;
  for (const bool barrier : {true, false}) {
    std::vector<int> out(64);
    launch(within_warps, 1, 64, 256, Stream{}, out.data(), barrier);
    CHECK((out == expected) == barrier);
  }
}

// Blocks of a cluster add up each other's numbers, twice.
__global__ void cluster_sums(int* out) {
  int* shared = shared_memory<int>();
  const unsigned i = threadIdx.x;
  shared[i] = static_cast<int>(blockIdx.x + 1);
  cluster_sync();
  int sum = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *cluster_shared(shared + i, rank);
  cluster_sync();
  shared[i] = sum;
  cluster_sync();
  out[blockIdx.x * blockDim.x + i] = *cluster_shared(shared + i, cluster_size() - 1);
}

TEST_CASE("clusters") {
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    const Setting setting(kH200, seed);
    std::vector<int> out(8 * 64);
    launch_cluster(cluster_sums, 8, 4, 64, 256, Stream{}, out.data());
    for (int i = 0; i < 8 * 64; ++i) CHECK(out[i] == (i < 4 * 64 ? 1 + 2 + 3 + 4 : 5 + 6 + 7 + 8));
  }
  const Setting setting(kA100);
  std::vector<int> out(8 * 64);
  const auto refused = [&] { launch_cluster(cluster_sums, 8, 4, 64, 256, Stream{}, out.data()); };
  CHECK(message_of(refused) == "the device has no clusters");
}

__global__ void copies(const double* from, double* out) {
  double* shared = shared_memory<double>();
  const unsigned i = threadIdx.x;
  copy_async<16>(shared + 2 * i, from + 2 * i);
  copy_commit();
  copy_async<8>(shared + 64 + i, from + i);
  copy_commit();
  out[i] = shared[2 * i];
  copy_wait<1>();
  out[32 + i] = shared[2 * i];
  out[64 + i] = shared[64 + i];
  copy_wait<0>();
  out[96 + i] = shared[64 + i];
}

TEST_CASE("asynchronous copies arrive when they are waited for; shared memory starts as NaN") {
  alignas(16) double from[64];
  std::iota(from, from + 64, 1.0);
  std::vector<double> out(128);
  launch(copies, 1, 32, 96 * sizeof(double), Stream{}, from, out.data());
  for (int i = 0; i < 32; ++i) {
    CHECK(std::isnan(out[i]));
    CHECK(out[32 + i] == from[2 * i]);
    CHECK(std::isnan(out[64 + i]));
    CHECK(out[96 + i] == from[i]);
  }
}

__global__ void some_wait(bool exits) {
  if (threadIdx.x < 32 || !exits) __syncthreads();
}
__global__ void half_a_warp() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void two_places() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void one_block_of_the_cluster() {
  if (cluster_rank() == 0) cluster_sync();
}
__global__ void writes_at(int index) {
  if (threadIdx.x == 0) shared_memory<volatile char>()[index] = 1;
}

TEST_CASE("threads that part are found") {
  const auto run = [](auto kernel, int threads, auto... arguments) {
    return message_of([&] { launch(kernel, 1, threads, 64, Stream{}, arguments...); });
  };
  CHECK(run(some_wait, 64, false).empty());
  CHECK(mentions(run(some_wait, 64, true), "part: at "));
  CHECK(mentions(run(half_a_warp, 32), "lanes of a warp of block (0, 0, 0) part"));
  CHECK(mentions(run(half_a_warp, 32), "__syncwarp (test_emulator.cpp:"));
  CHECK(mentions(run(two_places, 64), "warps of block (0, 0, 0) part"));
  const auto cluster =
      message_of([] { launch_cluster(one_block_of_the_cluster, 2, 2, 32, 0, Stream{}); });
  CHECK(mentions(cluster, "a barrier that not all threads reach"));
  CHECK(mentions(cluster, "cluster_sync"));
  CHECK(run(some_wait, 64, false).empty());  // a failure leaves nothing behind
}

TEST_CASE("launches beyond the device are refused") {
  const auto run = [](dim3 grid, int threads, size_t bytes) {
    return message_of([&] { launch(writes_at, grid, threads, bytes, Stream{}, 0); });
  };
  CHECK(run(1, 32, 64).empty());
  CHECK(run(1, 1024, kH200.shared_per_block).empty());
  CHECK(mentions(run(1, 1056, 64), "1056 threads"));
  CHECK(mentions(run(1, 33, 64), "33 threads"));
  CHECK(mentions(run(0, 32, 64), "a grid of (0, 1, 1) blocks"));
  CHECK(mentions(run(dim3(1, 70000), 32, 64), "a grid of"));
  CHECK(mentions(run(1, 32, kH200.shared_per_block + 1), "bytes of shared memory"));
  const Setting setting(kA100);
  CHECK(mentions(run(1, 32, 200000), "the device has 166912"));
}

#ifndef __SANITIZE_ADDRESS__
TEST_CASE("writes beside shared memory are found") {
  const auto run = [](int index) {
    return message_of([&] { launch(writes_at, 1, 32, 100, Stream{}, index); });
  };
  CHECK(run(99).empty());
  CHECK(mentions(run(100), "wrote outside its 100 bytes of shared memory"));
  CHECK(mentions(run(-1), "wrote outside"));
}
#endif

}  // namespace
}  // namespace fedlora::tests
