// fedlora: exact aggregation of federated LoRA adapters, in C++ without Python and torch.
//
//   find_package(fedlora REQUIRED)
//   target_link_libraries(server PRIVATE fedlora::core)
//
// The functions are the operators of fedlora_kernels.numpy and give the same bits. For each of L
// modules (linear layers of m x n), client k = 1..K has the factors B_k [m, r_k] and A_k [r_k, n],
// the weight w_k (sum 1) and the scaling s_k (alpha / r). Side by side they are B [m, R] and
// A [R, n], with R = sum_k r_k, and the ideal update is
//
//   dW = sum_k w_k s_k B_k A_k = B D A        D = diag(w_k s_k, repeated r_k times)
//
// All arrays are row-major. Inputs are read where they lie; results are written to memory that the
// caller allocates, and must not overlap the inputs. Functions may be called from several threads
// at once. All throw std::invalid_argument if an argument is wrong (nothing is written then), and
// std::runtime_error if factors are not finite.
#pragma once

#include <cstdint>
#include <span>

#if defined(__GNUC__)
#define FLK_API __attribute__((visibility("default")))
#else
#define FLK_API
#endif

namespace flk {

// Element types of factors; bfloat16 and float16 by their bits.
enum class DType { bf16, fp16, fp32, fp64 };

// One matrix of a factor. `stride` is the number of elements between two rows; 0 means `columns`.
struct Matrix {
  const void* data;
  int64_t rows;
  int64_t columns;
  int64_t stride = 0;
};

// The B or the A factors of all clients: matrices[l * K + k] is that of module l and client k.
// Modules have equal shapes; clients may differ in rank. Factors that are stacked already,
// [m, R] or [R, n], are the factors of one client (K = 1).
struct Factors {
  DType dtype;
  int64_t modules;
  std::span<const Matrix> matrices;
};

struct Options {
  int threads = 0;    // at most so many; 0: one for each processor
  bool fast = false;  // Gram matrices with float32 sums, for energies up to 1 - 1e-6
};

// "No limit" of a rank.
inline constexpr int64_t kAny = 0;

// G_B = B^T B, or G_A = A A^T if `rows` (the A side), in float64.
//   gram   [L, R, R]
FLK_API void gram(const Factors& x, bool rows, double* gram, const Options& options = {});

// Singular values and vectors of dW from two Gram matrices [L, R, R] and scale [L, R] (the diagonal
// of D). With energy < 1 or a max_rank, later values than these ask for may be left out (0).
struct Spectrum {
  double* sigma;         // [L, R], descending
  double* total_energy;  // [L], the sum of all squared singular values
  double* left;          // [L, R, R] with B left = U Sigma
  double* right;         // [L, R, R] with right A = V^T
  int64_t* info;         // [L], 0 unless an eigensolver did not converge
};
FLK_API void spectrum(int64_t modules, int64_t rank, const double* gram_b, const double* gram_a,
                      const double* scale, double energy, int64_t max_rank, const Spectrum& result,
                      const Options& options = {});

// The smallest rank whose leading squared singular values sum to energy * total, in (0, 1].
//   sigma [L, R], total_energy [L] -> ranks [L]
FLK_API void select_rank(int64_t modules, int64_t rank, const double* sigma,
                         const double* total_energy, double energy, int64_t max_rank,
                         int64_t* ranks);

// Inner products of the clients' own updates: <s_j B_j A_j, s_k B_k A_k> for each pair of clients,
// from two Gram matrices [L, R, R]; ranks [K] are r_k and scale [L, K] is s_k.
//   products [L, K, K]
FLK_API void client_products(int64_t modules, std::span<const int64_t> ranks, const double* gram_b,
                             const double* gram_a, const double* scale, double* products,
                             const Options& options = {});

// FLoRA-NA (arXiv 2509.26399): p and q for which (sum_k q_k s_k B_k) (sum_k p_k A_k) is closest to
// dW, for equal ranks r = R / K. weights [K] are w_k and scale [L, K] is s_k.
struct Surrogate {
  double* p;          // [L, K], of A
  double* q;          // [L, K], of B
  double* objective;  // [L, max_sweeps + 1], the squared error at p = q = w and after each sweep
};
FLK_API void surrogate(int64_t modules, int64_t clients, int64_t rank, const double* gram_b,
                       const double* gram_a, const double* weights, const double* scale,
                       int64_t max_sweeps, double tol, const Surrogate& result,
                       const Options& options = {});

// B_g = B X [L, m, width] and A_g = Y A [L, width, n] in the factors' type, with x [L, R, width]
// and y [L, width, R].
FLK_API void combine(const Factors& b, const Factors& a, int64_t width, const double* x,
                     const double* y, void* b_g, void* a_g, const Options& options = {});

// Weighted sums over the clients of stacked [L, K, elements]: out [L, elements] in the same type,
// with weights [L, K].
FLK_API void weighted_sum(DType dtype, int64_t modules, int64_t clients, int64_t elements,
                          const void* stacked, const double* weights, void* out,
                          const Options& options = {});

// FLoRIST (arXiv 2506.09199) in one call: the best factors of dW whose rank keeps `energy`, the
// singular values in B. `max_rank` is the width of the results, at most min(R, m, n); kAny means
// that. scale [L, R] is the diagonal of D.
struct Svd {
  void* b_g;       // [L, m, max_rank], zero beyond each module's rank
  void* a_g;       // [L, max_rank, n], likewise
  double* sigma;   // [L, R], descending, zero where not computed
  int64_t* ranks;  // [L]
};
FLK_API void stacked_svd(const Factors& b, const Factors& a, const double* scale, double energy,
                         int64_t max_rank, const Svd& result, const Options& options = {});

// FLoRA-NA in one call: B_hat = sum_k q_k s_k B_k, A_hat = sum_k p_k A_k, in at most 50 sweeps.
// weights [K], scale [L, K].
struct FloraNa {
  void* b_hat;        // [L, m, r]
  void* a_hat;        // [L, r, n]
  double* p;          // [L, K]
  double* q;          // [L, K]
  double* objective;  // [L, 51]
};
FLK_API void flora_na(const Factors& b, const Factors& a, const double* weights,
                      const double* scale, const FloraNa& result, const Options& options = {});

}  // namespace flk
