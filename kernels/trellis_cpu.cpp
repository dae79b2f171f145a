// Trellis-coded linear layers on the CPU: decode a weight, multiply by it straight from its bits, and find the codes.
//
// Plain C functions called through ctypes; see kernels/trellis.py for what is computed. Rows are decoded eight at a
// time: the codes of eight rows are `width` whole bytes, and one word holds them with the 16 bits before them.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>
#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "terms.h"

namespace {

int64_t column_bytes(int64_t out, int32_t width) { return (out * width + 7) / 8; }

uint64_t load_word(const uint8_t *bytes) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    return __builtin_bswap64(word);
}

// The bits of rows 8 * group to 8 * group + 7 from bit 47 downwards, the 16 bits before them above.
uint64_t word_of(const uint8_t *column, int64_t size, int64_t left, int32_t width, int64_t group) {
    const int64_t at = group * width - 2;
    if (at >= 0 && at + 8 <= left) return load_word(column + at);  // bytes of the next column do no harm
    uint64_t word = 0;
    for (int64_t i = at < 0 ? 0 : at; i < at + 8 && i < size; i++) word |= uint64_t(column[i]) << (8 * (7 - (i - at)));
    return word;
}

using Eight = float __attribute__((vector_size(32)));

// The values of eight rows. Plain loads: on current CPUs they are faster than a gather.
template <int width>
inline Eight eight_of(uint64_t word, const float *table, uint32_t mask) {
    auto value = [&](int row) { return table[uint32_t(word >> (48 - width * (row + 1))) & mask]; };
    return Eight{value(0), value(1), value(2), value(3), value(4), value(5), value(6), value(7)};
}

constexpr int64_t MOST_ROWS = 4;  // GEMV_ROWS of decoded_linear.py
struct Factors {
    float of[MOST_ROWS];
};

// Calls `f` with the width as a compile-time constant.
template <typename F>
void with_width(int32_t width, F &&f) {
    switch (width) {
        case 1: return f(std::integral_constant<int, 1>());
        case 2: return f(std::integral_constant<int, 2>());
        case 3: return f(std::integral_constant<int, 3>());
        case 4: return f(std::integral_constant<int, 4>());
        case 5: return f(std::integral_constant<int, 5>());
        default: return f(std::integral_constant<int, 6>());
    }
}

// sums [rows, padded] += factors [rows] times the values of one column, groups of eight rows from `begin` to `end`;
// `fixed` is the number of input rows where it is known beforehand, else 0
template <int width, int fixed>
void add_column(const uint8_t *column, int64_t size, int64_t left, int64_t begin, int64_t end, const float *table,
                uint32_t mask, Factors factors, float *sums, int64_t padded, int64_t rows = fixed) {
    auto add = [&](int64_t g, uint64_t word) {
        const Eight values = eight_of<width>(word, table, mask);
        for (int64_t r = 0; r < (fixed ? fixed : rows); r++) {
            float *at = sums + r * padded + 8 * g;
            Eight sum;
            std::memcpy(&sum, at, 32);
            sum += factors.of[r] * values;
            std::memcpy(at, &sum, 32);
        }
    };
    int64_t g = begin;
    for (; g < end && g * width < 2; g++) add(g, word_of(column, size, left, width, g));
    for (; g < end && g * width + 6 <= left; g++) add(g, load_word(column + g * width - 2));
    for (; g < end; g++) add(g, word_of(column, size, left, width, g));
}

// One step of the Viterbi algorithm for all states: `cost` to `next`, and which of the 2^width states each best way
// came from. States that share all but the `width` bits about to leave lie `rest` apart.
template <int width>
void step(const float *cost, float *next, uint8_t *from, const float *table, int64_t rest, float target, float weight) {
    constexpr int ways = 1 << width;
    int64_t p = 0;
#if defined(__AVX2__)
    const __m256 wanted = _mm256_set1_ps(target), factor = _mm256_set1_ps(weight);
    for (; p + 8 <= rest; p += 8) {
        __m256 best = _mm256_loadu_ps(cost + p);
        __m256i way = _mm256_setzero_si256();
        for (int t = 1; t < ways; t++) {
            __m256 other = _mm256_loadu_ps(cost + t * rest + p);
            __m256 less = _mm256_cmp_ps(other, best, _CMP_LT_OQ);
            best = _mm256_min_ps(other, best);
            way = _mm256_blendv_epi8(way, _mm256_set1_epi32(t), _mm256_castps_si256(less));
        }
        __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(way), _mm256_extracti128_si256(way, 1));
        _mm_storel_epi64((__m128i *)(from + p), _mm_packus_epi16(narrow, narrow));
        for (int c = 0; c < ways; c++) {  // eight states: `8 / ways` of the best, each `ways` times
            alignas(32) int32_t lanes[8];
            for (int lane = 0; lane < 8; lane++) lanes[lane] = (8 * c + lane) >> width;
            __m256 spread = _mm256_permutevar8x32_ps(best, _mm256_load_si256((const __m256i *)lanes));
            __m256 gap = _mm256_sub_ps(_mm256_loadu_ps(table + (p << width) + 8 * c), wanted);
            _mm256_storeu_ps(next + (p << width) + 8 * c, _mm256_fmadd_ps(_mm256_mul_ps(factor, gap), gap, spread));
        }
    }
#endif
    for (; p < rest; p++) {
        float best = cost[p];
        uint8_t way = 0;
        for (int t = 1; t < ways; t++)
            if (cost[t * rest + p] < best) best = cost[t * rest + p], way = uint8_t(t);
        from[p] = way;
        for (int c = 0; c < ways; c++) {
            float gap = table[(p << width) + c] - target;
            next[(p << width) + c] = best + weight * gap * gap;
        }
    }
}

template <int width>
void search(const float *target, const float *weights, const float *table, uint8_t *codes, int64_t n, int32_t state_bits) {
    const int64_t states = int64_t(1) << state_bits, rest = states >> width;
    std::vector<float> first(states, 1e30f), second(states);
    std::vector<uint8_t> from(n * rest);
    float *cost = first.data(), *next = second.data();
    cost[0] = 0;
    for (int64_t i = 0; i < n; i++) {
        step<width>(cost, next, from.data() + i * rest, table, rest, target[i], weights[i]);
        std::swap(cost, next);
    }
    int64_t state = 0;
    for (int64_t s = 1; s < states; s++)
        if (cost[s] < cost[state]) state = s;
    for (int64_t i = n - 1; i >= 0; i--) {
        codes[i] = uint8_t(state & ((1 << width) - 1));
        const int64_t kept = state >> width;
        state = kept | int64_t(from[i * rest + kept]) << (state_bits - width);
    }
}

}  // namespace

extern "C" {

struct Weight {
    const uint8_t *stream;  // columns one after another
    const uint8_t *widths;  // [in]
    const float *tables;    // [6, 2^state_bits]
    const void *scales;     // [out]
    const void *perm;       // [in] or null
    const void *lr_a;       // [rank, in] or null
    const void *lr_b;       // [out, rank]
    const float *lr_scale;  // [rank] or null; int8 factors have one
    const void *sparse_rows, *sparse_columns;  // [sparse], where single weights are added
    const uint16_t *sparse_values;  // [sparse], float16
    int64_t bytes, out, in, rank, sparse;
    int32_t state_bits, scale_type, perm_bytes, lr_type, place_bytes;
};

static const float *table_of(const Weight *w, int32_t width) { return w->tables + (int64_t(width - 1) << w->state_bits); }

// y [rows, out] = x [rows, in] times the weight, all terms included; at most four rows at a time
void gemv(const Weight *w, const void *x, void *y, int64_t rows, int32_t type, int32_t threads) {
    std::vector<float> inputs(rows * w->in), line(w->in), low(rows * w->rank), single(rows * w->out, 0.0f);
    for (int64_t r = 0; r < rows; r++) {
        read_row(x, r * w->in, line.data(), w->in, type);
        for (int64_t k = 0; k < w->in; k++) inputs[r * w->in + k] = line[column_of(w, k)];
        add_sparse(w, line.data(), &single[r * w->out]);
        to_low(w, line.data(), low.data() + r * w->rank);
    }
    const int64_t groups = (w->out + 7) / 8, padded = 8 * groups;
    std::vector<float> result(rows * padded, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = groups * me / team, end = groups * (me + 1) / team;
        const uint32_t mask = (1u << w->state_bits) - 1;
        const uint8_t *column = w->stream;
        float *const sums = result.data();
        for (int64_t k = 0; k < w->in; k++) {
            const int64_t size = column_bytes(w->out, w->widths[k]), left = w->stream + w->bytes - column;
            const float *table = table_of(w, w->widths[k]);
            Factors factors;
            for (int64_t r = 0; r < rows; r++) factors.of[r] = inputs[r * w->in + k];
            with_width(w->widths[k], [=](auto width) {
                if (rows == 1) add_column<width, 1>(column, size, left, begin, end, table, mask, factors, sums, padded);
                else add_column<width, 0>(column, size, left, begin, end, table, mask, factors, sums, padded, rows);
            });
            column += size;
        }
        for (int64_t o = 8 * begin; o < 8 * end && o < w->out; o++) {
            const float scale = read(w->scales, o, w->scale_type);
            for (int64_t r = 0; r < rows; r++) {
                float total = result[r * padded + o] * scale + single[r * w->out + o];
                for (int64_t i = 0; i < w->rank; i++)
                    total += low[r * w->rank + i] * read(w->lr_b, o * w->rank + i, w->lr_type);
                write(y, r * w->out + o, total, type);
            }
        }
    }
}

// dense [in, out], columns in the order of the stream, of the codes alone
void decode(const Weight *w, void *dense, int32_t type, int32_t threads) {
    std::vector<int64_t> starts(w->in + 1, 0);
    for (int64_t k = 0; k < w->in; k++) starts[k + 1] = starts[k] + column_bytes(w->out, w->widths[k]);
    std::vector<float> scales(w->out);
    for (int64_t o = 0; o < w->out; o++) scales[o] = read(w->scales, o, w->scale_type);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < w->in; k++) {
        const uint8_t *column = w->stream + starts[k];
        const uint32_t mask = (1u << w->state_bits) - 1;
        const int64_t row = column_of(w, k) * w->out;
        with_width(w->widths[k], [&](auto width) {
            for (int64_t g = 0; 8 * g < w->out; g++) {
                const uint64_t word = word_of(column, starts[k + 1] - starts[k], w->bytes - starts[k], width, g);
                const Eight values = eight_of<width>(word, table_of(w, width), mask);
                for (int64_t o = 8 * g; o < 8 * g + 8 && o < w->out; o++)
                    write(dense, row + o, values[o - 8 * g] * scales[o], type);
            }
        });
    }
}

// the codes [n] of least sum(weights * (target - value)^2), for one column
void viterbi(const float *target, const float *weights, const float *table, uint8_t *codes, int64_t n, int32_t width,
             int32_t state_bits) {
    with_width(width, [&](auto w) { search<w>(target, weights, table, codes, n, state_bits); });
}

}  // extern "C"
