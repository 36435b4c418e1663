// The BLAS and LAPACK routines the core uses, column-major, 64-bit integers.
//
// They come from the scipy-openblas64 wheel, whose symbols carry the prefix scipy_ and the suffix
// 64_. OpenBLAS's own threads are switched off: the loops over modules and panels are the parallel
// ones, and a result must not depend on the number of threads.
#pragma once

#include <cstdint>

namespace fedlora::lapack {

// C = alpha op(A) op(B) + beta C
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, double alpha,
          const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
          int64_t ldc);

// y = alpha op(A) x + beta y
void gemv(bool transpose, int64_t m, int64_t n, double alpha, const double* a, int64_t lda,
          const double* x, double beta, double* y);

// Lower triangle of C = A A^T + beta C, A [n, k]
void syrk(int64_t n, int64_t k, const double* a, int64_t lda, double beta, double* c, int64_t ldc);

// B = L B, L^T B (left) or B L (right), L lower triangular
void trmm(bool left, bool transpose, int64_t m, int64_t n, const double* l, int64_t ldl, double* b,
          int64_t ldb);

// B = L^-T B, L lower triangular
void solve_transposed(int64_t m, int64_t n, const double* l, int64_t ldl, double* b, int64_t ldb);

// Cholesky of the lower triangle in place; false where a pivot is not positive.
bool cholesky(int64_t n, double* a, int64_t lda);

// Solves A x = b from its Cholesky factor, in place.
void cholesky_solve(int64_t n, const double* l, int64_t ldl, double* b);

// Pivoted Cholesky of the lower triangle in place, stopped at a pivot <= tolerance; returns the
// rank, 0 where no diagonal entry is positive. pivot[i] (from 0) is the row of A that came i-th.
int64_t pivoted_cholesky(int64_t n, double* a, int64_t lda, int64_t* pivot, double tolerance);

// All eigenvalues (ascending) and eigenvectors (in place) of the symmetric matrix a; false where
// the solver did not converge.
bool symmetric_eigen(int64_t n, double* a, double* values);

// All eigenvalues, ascending, of the symmetric tridiagonal T with diagonal [n] and beside [n - 1],
// in its diagonal; destroys beside. False: not converged.
bool tridiagonal_values(int64_t n, double* diagonal, double* beside);

// All eigenvalues of T, ascending, in its diagonal, and its eigenvectors [n, n]; destroys beside.
// False: not converged.
bool tridiagonal_eigen(int64_t n, double* diagonal, double* beside, double* vectors);

// Eigenvectors [n, count] of T for its eigenvalues `values` (ascending), by inverse iteration.
// False: not all converged.
bool tridiagonal_vectors(int64_t n, const double* diagonal, const double* beside, int64_t count,
                         const double* values, double* vectors);

// C = Q C, C [n, count], for the Q of Kernels::tridiagonal.
void apply_tridiagonal_q(int64_t n, int64_t count, const double* a, const double* tau, double* c);

// Thin QR in place: R in the upper triangle, reflectors below, tau [min(m, n)].
void qr(int64_t m, int64_t n, double* a, double* tau);

// The first n columns of Q, in place of the reflectors.
void q_columns(int64_t m, int64_t n, double* a, double* tau);

// C = Q C with Q from k reflectors.
void apply_q(int64_t m, int64_t n, int64_t k, const double* a, const double* tau, double* c);

// Thin SVD of a [m, n] (destroyed): u [m, k], values descending, vt [k, n], k = min(m, n); false
// where it did not converge.
bool svd(int64_t m, int64_t n, double* a, double* values, double* u, double* vt);

}  // namespace fedlora::lapack
