// What linear layers in any code share: the order of the columns, the low-rank term and single weights. W is the
// `struct Weight` of the file that includes this.

#pragma once

#include "elements.h"

namespace {

template <typename W>
int64_t column_of(const W *w, int64_t k) {
    return w->perm ? read_index(w->perm, k, w->perm_bytes) : k;
}

template <typename T>
float dot_factor(const T *a, const float *x, int64_t n) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < n; j++) total += float(a[j]) * x[j];
    return total;
}

// low [rank] = lr_a x
template <typename W>
void to_low(const W *w, const float *x, float *low) {
    for (int64_t i = 0; i < w->rank; i++) {
        const int64_t at = i * w->in;
        if (w->lr_type == F32) low[i] = dot_factor(static_cast<const float *>(w->lr_a) + at, x, w->in);
        else if (w->lr_type == I8) low[i] = dot_factor(static_cast<const int8_t *>(w->lr_a) + at, x, w->in);
        else low[i] = dot_factor(static_cast<const _Float16 *>(w->lr_a) + at, x, w->in);
        if (w->lr_scale) low[i] *= w->lr_scale[i];
    }
}

// y [out] += the single weights of W times x [in]
template <typename W>
void add_sparse(const W *w, const float *x, float *y) {
    for (int64_t i = 0; i < w->sparse; i++)
        y[read_index(w->sparse_rows, i, w->place_bytes)] +=
            half_to_float(w->sparse_values[i]) * x[read_index(w->sparse_columns, i, w->place_bytes)];
}

}  // namespace
