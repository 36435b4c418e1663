#include "lapack.h"

#include <algorithm>
#include <cstddef>

#include "memory.h"

using Int = int64_t;
using Length = size_t;  // Fortran passes the length of every CHARACTER argument at the end

extern "C" {
void scipy_openblas_set_num_threads64_(int);
void scipy_dgemm_64_(const char*, const char*, const Int*, const Int*, const Int*, const double*,
                     const double*, const Int*, const double*, const Int*, const double*, double*,
                     const Int*, Length, Length);
void scipy_dgemv_64_(const char*, const Int*, const Int*, const double*, const double*, const Int*,
                     const double*, const Int*, const double*, double*, const Int*, Length);
void scipy_dsyrk_64_(const char*, const char*, const Int*, const Int*, const double*, const double*,
                     const Int*, const double*, double*, const Int*, Length, Length);
void scipy_dtrmm_64_(const char*, const char*, const char*, const char*, const Int*, const Int*,
                     const double*, const double*, const Int*, double*, const Int*, Length, Length,
                     Length, Length);
void scipy_dtrsm_64_(const char*, const char*, const char*, const char*, const Int*, const Int*,
                     const double*, const double*, const Int*, double*, const Int*, Length, Length,
                     Length, Length);
void scipy_dpotrf_64_(const char*, const Int*, double*, const Int*, Int*, Length);
void scipy_dpotrs_64_(const char*, const Int*, const Int*, const double*, const Int*, double*,
                      const Int*, Int*, Length);
void scipy_dpstrf_64_(const char*, const Int*, double*, const Int*, Int*, Int*, const double*,
                      double*, Int*, Length);
void scipy_dsyevd_64_(const char*, const char*, const Int*, double*, const Int*, double*, double*,
                      const Int*, Int*, const Int*, Int*, Length, Length);
void scipy_dsterf_64_(const Int*, double*, double*, Int*);
void scipy_dstedc_64_(const char*, const Int*, double*, double*, double*, const Int*, double*,
                      const Int*, Int*, const Int*, Int*, Length);
void scipy_dstein_64_(const Int*, const double*, const double*, const Int*, const double*,
                      const Int*, const Int*, double*, const Int*, double*, Int*, Int*, Int*);
void scipy_dormtr_64_(const char*, const char*, const char*, const Int*, const Int*, const double*,
                      const Int*, const double*, double*, const Int*, double*, const Int*, Int*,
                      Length, Length, Length);
void scipy_dgeqrf_64_(const Int*, const Int*, double*, const Int*, double*, double*, const Int*,
                      Int*);
void scipy_dorgqr_64_(const Int*, const Int*, const Int*, double*, const Int*, const double*,
                      double*, const Int*, Int*);
void scipy_dormqr_64_(const char*, const char*, const Int*, const Int*, const Int*, const double*,
                      const Int*, const double*, double*, const Int*, double*, const Int*, Int*,
                      Length, Length);
void scipy_dgesdd_64_(const char*, const Int*, const Int*, double*, const Int*, double*, double*,
                      const Int*, double*, const Int*, double*, const Int*, Int*, Int*, Length);
}

namespace fedlora::lapack {
namespace {

// The library is loaded for this core; nobody else in the process asks it for threads.
[[maybe_unused]] const bool kSingleThreaded = [] {
  scipy_openblas_set_num_threads64_(1);
  return true;
}();

constexpr Int kStep = 1;
constexpr Int kBlock = 32;  // columns a blocked factorization works on at once

const char* transposed(bool yes) { return yes ? "T" : "N"; }
Int leading(Int n) { return std::max<Int>(n, 1); }

}  // namespace

void gemm(bool transpose_a, bool transpose_b, Int m, Int n, Int k, double alpha, const double* a,
          Int lda, const double* b, Int ldb, double beta, double* c, Int ldc) {
  scipy_dgemm_64_(transposed(transpose_a), transposed(transpose_b), &m, &n, &k, &alpha, a, &lda, b,
                  &ldb, &beta, c, &ldc, 1, 1);
}

void gemv(bool transpose, Int m, Int n, double alpha, const double* a, Int lda, const double* x,
          double beta, double* y) {
  scipy_dgemv_64_(transposed(transpose), &m, &n, &alpha, a, &lda, x, &kStep, &beta, y, &kStep, 1);
}

void syrk(Int n, Int k, const double* a, Int lda, double beta, double* c, Int ldc) {
  const double one = 1;
  scipy_dsyrk_64_("L", "N", &n, &k, &one, a, &lda, &beta, c, &ldc, 1, 1);
}

void trmm(bool left, bool transpose, Int m, Int n, const double* l, Int ldl, double* b, Int ldb) {
  const double one = 1;
  scipy_dtrmm_64_(left ? "L" : "R", "L", transposed(transpose), "N", &m, &n, &one, l, &ldl, b, &ldb,
                  1, 1, 1, 1);
}

void solve_transposed(Int m, Int n, const double* l, Int ldl, double* b, Int ldb) {
  const double one = 1;
  scipy_dtrsm_64_("L", "L", "T", "N", &m, &n, &one, l, &ldl, b, &ldb, 1, 1, 1, 1);
}

bool cholesky(Int n, double* a, Int lda) {
  Int info = 0;
  scipy_dpotrf_64_("L", &n, a, &lda, &info, 1);
  return info == 0;
}

void cholesky_solve(Int n, const double* l, Int ldl, double* b) {
  Int info = 0;
  const Int ldb = leading(n);
  scipy_dpotrs_64_("L", &n, &kStep, l, &ldl, b, &ldb, &info, 1);
}

Int pivoted_cholesky(Int n, double* a, Int lda, Int* pivot, double tolerance) {
  Int rank = 0;
  Int info = 0;
  const Buffer<double> work(2 * n);
  scipy_dpstrf_64_("L", &n, a, &lda, pivot, &rank, &tolerance, work.get(), &info, 1);
  for (Int i = 0; i < n; ++i) --pivot[i];
  return rank;
}

bool symmetric_eigen(Int n, double* a, double* values) {
  const Int size = 1 + 6 * n + 2 * n * n;
  const Int integers = 3 + 5 * n;
  const Buffer<double> work(size);
  const Buffer<Int> integer_work(integers);
  Int info = 0;
  const Int lda = leading(n);
  scipy_dsyevd_64_("V", "U", &n, a, &lda, values, work.get(), &size, integer_work.get(), &integers,
                   &info, 1, 1);
  return info == 0;
}

bool tridiagonal_values(Int n, double* diagonal, double* beside) {
  Int info = 0;
  scipy_dsterf_64_(&n, diagonal, beside, &info);
  return info == 0;
}

bool tridiagonal_eigen(Int n, double* diagonal, double* beside, double* vectors) {
  const Int size = 1 + 4 * n + n * n;
  const Int integers = 3 + 5 * n;
  const Buffer<double> work(size);
  const Buffer<Int> integer_work(integers);
  Int info = 0;
  const Int ldz = leading(n);
  scipy_dstedc_64_("I", &n, diagonal, beside, vectors, &ldz, work.get(), &size, integer_work.get(),
                   &integers, &info, 1);
  return info == 0;
}

bool tridiagonal_vectors(Int n, const double* diagonal, const double* beside, Int count,
                         const double* values, double* vectors) {
  const Buffer<double> work(5 * n);
  const Buffer<Int> integers(4 * n);
  Int* block = integers.get() + n;  // the one block that each eigenvalue belongs to
  Int* end = block + n;             // of that block
  Int* failed = end + n;
  std::fill_n(block, n, Int{1});
  std::fill_n(end, n, n);
  Int info = 0;
  const Int ldz = leading(n);
  scipy_dstein_64_(&n, diagonal, beside, &count, values, block, end, vectors, &ldz, work.get(),
                   integers.get(), failed, &info);
  return info == 0;
}

void apply_tridiagonal_q(Int n, Int count, const double* a, const double* tau, double* c) {
  const Int size = leading(count) * kBlock + 65 * 64;  // a 65 x 64 triangle, as in apply_q
  const Buffer<double> work(size);
  Int info = 0;
  const Int ld = leading(n);
  scipy_dormtr_64_("L", "L", "N", &n, &count, a, &ld, tau, c, &ld, work.get(), &size, &info, 1, 1,
                   1);
}

void qr(Int m, Int n, double* a, double* tau) {
  const Int size = leading(n) * kBlock;
  const Buffer<double> work(size);
  Int info = 0;
  const Int lda = leading(m);
  scipy_dgeqrf_64_(&m, &n, a, &lda, tau, work.get(), &size, &info);
}

void q_columns(Int m, Int n, double* a, double* tau) {
  const Int size = leading(n) * kBlock;
  const Buffer<double> work(size);
  Int info = 0;
  const Int lda = leading(m);
  scipy_dorgqr_64_(&m, &n, &n, a, &lda, tau, work.get(), &size, &info);
}

void apply_q(Int m, Int n, Int k, const double* a, const double* tau, double* c) {
  const Int size = leading(n) * 64 + 65 * 64;  // dormqr keeps a 65 x 64 triangle in its workspace
  const Buffer<double> work(size);
  Int info = 0;
  const Int ld = leading(m);
  scipy_dormqr_64_("L", "N", &m, &n, &k, a, &ld, tau, c, &ld, work.get(), &size, &info, 1, 1);
}

bool svd(Int m, Int n, double* a, double* values, double* u, double* vt) {
  const Int k = std::min(m, n);
  const Int lda = leading(m);
  const Int ldvt = leading(k);
  const Int query = -1;
  Int info = 0;
  double best = 0;
  const Buffer<Int> integer_work(8 * k);
  scipy_dgesdd_64_("S", &m, &n, a, &lda, values, u, &lda, vt, &ldvt, &best, &query,
                   integer_work.get(), &info, 1);
  const Int size = static_cast<Int>(best);
  const Buffer<double> work(size);
  scipy_dgesdd_64_("S", &m, &n, a, &lda, values, u, &lda, vt, &ldvt, work.get(), &size,
                   integer_work.get(), &info, 1);
  return info == 0;
}

}  // namespace fedlora::lapack
