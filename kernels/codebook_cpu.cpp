// Codebook linear layers on the CPU: decode a weight, or multiply by it straight from its packed codes.
//
// Plain C functions called through ctypes; see kernels/codebook.py for what is computed. Codewords come padded to
// `width` = 1, 2, 4 or 8 floats, so that one load fetches one, and inputs are laid out alike.

#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "terms.h"

namespace {

uint64_t spread(uint64_t word, int32_t bits) {
    const uint64_t mask = (1ull << bits) - 1;
#if defined(__BMI2__)
    return _pdep_u64(word, mask * 0x0101010101010101ull);
#else
    uint64_t bytes = 0;
    for (int k = 0; k < 8; k++) bytes |= (word >> (k * bits) & mask) << (8 * k);
    return bytes;
#endif
}

// The codes of one row, one byte each, least significant bit first. Up to 7 bytes beyond `n` are written too.
void unpack_row(const uint8_t *packed, int64_t row_bytes, int32_t bits, int64_t n, uint8_t *codes) {
    if (bits == 8) {
        std::memcpy(codes, packed, n);
        return;
    }
    int64_t i = 0, at = 0;  // eight codes are `bits` whole bytes
    for (; at + 8 <= row_bytes && i < n; i += 8, at += bits) {
        uint64_t word, bytes;
        std::memcpy(&word, packed + at, 8);
        bytes = spread(word, bits);
        std::memcpy(codes + i, &bytes, 8);
    }
    for (; i < n; i += 8, at += bits) {  // here eight bytes would reach beyond the row
        uint64_t word = 0, bytes;
        std::memcpy(&word, packed + at, row_bytes - at);
        bytes = spread(word, bits);
        std::memcpy(codes + i, &bytes, 8);
    }
}

#if defined(__AVX2__)
float sum_of(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#endif

// sum over n codes of table[code] . x, both `width` floats wide; a table of width 1 has at least 16 rows
template <int width>
float dot(const uint8_t *codes, int64_t n, const float *table, int32_t bits, const float *x) {
    float total = 0;
    int64_t i = 0;
#if defined(__AVX512F__)
    if constexpr (width == 1) {
        __m512 sum = _mm512_setzero_ps();
        for (; i + 16 <= n; i += 16) {
            __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i)));
            sum = _mm512_fmadd_ps(_mm512_i32gather_ps(index, table, 4), _mm512_loadu_ps(x + i), sum);
        }
        total = _mm512_reduce_add_ps(sum);
    } else if constexpr (width == 2) {
        __m512 a = _mm512_setzero_ps(), b = a;
        for (; i + 16 <= n; i += 16) {
            __m256i low = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
            __m256i high = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i + 8)));
            __m512 c = _mm512_castpd_ps(_mm512_i32gather_pd(low, (const double *)table, 8));
            __m512 d = _mm512_castpd_ps(_mm512_i32gather_pd(high, (const double *)table, 8));
            a = _mm512_fmadd_ps(c, _mm512_loadu_ps(x + 2 * i), a);
            b = _mm512_fmadd_ps(d, _mm512_loadu_ps(x + 2 * i + 16), b);
        }
        total = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
    }
#endif
#if defined(__AVX2__)
    if constexpr (width == 1) {
        if (bits <= 4) {  // the table fits two registers
            const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
            __m256 sum = _mm256_setzero_ps();
            for (; i + 8 <= n; i += 8) {
                __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + i)));
                __m256 a = _mm256_permutevar8x32_ps(low, code), b = _mm256_permutevar8x32_ps(high, code);
                __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));  // bit 3 becomes the sign
                sum = _mm256_fmadd_ps(_mm256_blendv_ps(a, b, upper), _mm256_loadu_ps(x + i), sum);
            }
            total += sum_of(sum);
        }
    } else if constexpr (width == 2) {
        const double *pairs = (const double *)table;  // loads beat the gather instruction here
        __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (; i + 16 <= n; i += 16)
            for (int k = 0; k < 4; k++) {
                const uint8_t *c = codes + i + 4 * k;
                __m128d a = _mm_loadh_pd(_mm_load_sd(pairs + c[0]), pairs + c[1]);
                __m128d b = _mm_loadh_pd(_mm_load_sd(pairs + c[2]), pairs + c[3]);
                __m256 four = _mm256_castpd_ps(_mm256_set_m128d(b, a));
                sums[k] = _mm256_fmadd_ps(four, _mm256_loadu_ps(x + 2 * i + 8 * k), sums[k]);
            }
        total += sum_of(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    } else if constexpr (width == 4) {
        __m128 sums[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
        for (; i + 4 <= n; i += 4)
            for (int k = 0; k < 4; k++)
                sums[k] = _mm_fmadd_ps(_mm_loadu_ps(table + 4 * codes[i + k]), _mm_loadu_ps(x + 4 * (i + k)), sums[k]);
        __m128 sum = _mm_add_ps(_mm_add_ps(sums[0], sums[1]), _mm_add_ps(sums[2], sums[3]));
        total = sum_of(_mm256_zextps128_ps256(sum));
    } else if constexpr (width == 8) {
        __m256 a = _mm256_setzero_ps(), b = a;
        for (; i + 2 <= n; i += 2) {
            a = _mm256_fmadd_ps(_mm256_loadu_ps(table + 8 * codes[i]), _mm256_loadu_ps(x + 8 * i), a);
            b = _mm256_fmadd_ps(_mm256_loadu_ps(table + 8 * codes[i + 1]), _mm256_loadu_ps(x + 8 * i + 8), b);
        }
        total = sum_of(_mm256_add_ps(a, b));
    }
#endif
    for (; i < n; i++)
        for (int k = 0; k < width; k++) total += table[width * codes[i] + k] * x[width * i + k];
    return total;
}

struct Weight {
    const uint8_t *packed;   // [out, row_bytes]
    const float *table;      // [2^bits, width]
    const void *scales;      // [out, groups]
    const void *zeros;       // [out, groups] or null
    const void *perm;        // [in] or null
    const void *lr_a;        // [rank, in] or null
    const void *lr_b;        // [out, rank]
    const float *lr_scale;   // [rank] or null; int8 factors have one
    const void *sparse_rows, *sparse_columns;  // [sparse], where single weights are added
    const uint16_t *sparse_values;  // [sparse], float16
    int64_t out, in, row_bytes, group, groups, rank, sparse;
    int32_t bits, size, width, scale_type, perm_bytes, lr_type, place_bytes;
};

float dot_any(const Weight *w, const uint8_t *codes, int64_t n, const float *x) {
    switch (w->width) {
        case 1: return dot<1>(codes, n, w->table, w->bits, x);
        case 2: return dot<2>(codes, n, w->table, w->bits, x);
        case 4: return dot<4>(codes, n, w->table, w->bits, x);
        default: return dot<8>(codes, n, w->table, w->bits, x);
    }
}

// inputs [codes in a row, width] in the order of the codes; what is beyond a codeword or the row stays zero
void lay_out(const Weight *w, const float *line, float *inputs) {
    for (int64_t k = 0; k < w->in; inputs += w->width)
        for (int32_t t = 0; t < w->size && k < w->in; t++, k++) inputs[t] = line[column_of(w, k)];
}

// Codewords of a row one after the other; a whole padded codeword is copied, the next one overwrites what is too much.
template <int width>
void look_up(const uint8_t *codes, int64_t n, int64_t size, const float *table, float *to) {
    for (int64_t i = 0; i < n; i++) std::memcpy(to + size * i, table + width * codes[i], 4 * width);
}

void look_up_any(const Weight *w, const uint8_t *codes, int64_t n, float *to) {
    switch (w->width) {
        case 1: return look_up<1>(codes, n, 1, w->table, to);
        case 2: return look_up<2>(codes, n, 2, w->table, to);
        case 4: return w->size == 4 ? look_up<4>(codes, n, 4, w->table, to) : look_up<4>(codes, n, 3, w->table, to);
        default: return look_up<8>(codes, n, w->size, w->table, to);
    }
}

}  // namespace

extern "C" {

// y [rows, out] = x [rows, in] times the weight, all terms included
void gemv(const Weight *w, const void *x, void *y, int64_t rows, int32_t type, int32_t threads) {
    const int64_t codes_in_row = (w->in + w->size - 1) / w->size, group_codes = w->group / w->size;
    const int64_t laid = codes_in_row * w->width;
    std::vector<float> inputs(rows * laid, 0.0f), sums(rows * w->groups, 0.0f), low(rows * w->rank);
    std::vector<float> line(w->in), result(rows * w->out, 0.0f);
    for (int64_t r = 0; r < rows; r++) {
        read_row(x, r * w->in, line.data(), w->in, type);
        lay_out(w, line.data(), inputs.data() + r * laid);
        to_low(w, line.data(), low.data() + r * w->rank);
        add_sparse(w, line.data(), &result[r * w->out]);
        for (int64_t k = 0; w->zeros && k < w->in; k++) sums[r * w->groups + k / w->group] += line[column_of(w, k)];
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> codes(codes_in_row + 8);
        std::vector<float> factor(w->rank);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < w->out; o++) {
            unpack_row(w->packed + o * w->row_bytes, w->row_bytes, w->bits, codes_in_row, codes.data());
            read_row(w->lr_b, o * w->rank, factor.data(), w->rank, w->lr_type);
            for (int64_t r = 0; r < rows; r++) {
                float total = result[r * w->out + o];
                for (int64_t g = 0; g < w->groups; g++) {
                    int64_t first = g * group_codes;
                    int64_t n = w->groups == 1 || codes_in_row - first < group_codes ? codes_in_row - first : group_codes;
                    float part = dot_any(w, codes.data() + first, n, inputs.data() + r * laid + first * w->width);
                    total += part * read(w->scales, o * w->groups + g, w->scale_type);
                    if (w->zeros) total += sums[r * w->groups + g] * read(w->zeros, o * w->groups + g, w->scale_type);
                }
                result[r * w->out + o] = total + dot_factor(factor.data(), low.data() + r * w->rank, w->rank);
            }
        }
    }
    write_row(y, 0, result.data(), rows * w->out, type);
}

// dense [out, in] of the codes alone
void decode(const Weight *w, void *dense, int32_t type, int32_t threads) {
    const int64_t codes_in_row = (w->in + w->size - 1) / w->size;
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> codes(codes_in_row + 8);
        std::vector<float> stored(codes_in_row * w->size + 8), line(w->in);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < w->out; o++) {
            unpack_row(w->packed + o * w->row_bytes, w->row_bytes, w->bits, codes_in_row, codes.data());
            look_up_any(w, codes.data(), codes_in_row, stored.data());
            for (int64_t g = 0; g < w->groups; g++) {
                const float scale = read(w->scales, o * w->groups + g, w->scale_type);
                const float zero = w->zeros ? read(w->zeros, o * w->groups + g, w->scale_type) : 0;
                const int64_t begin = g * w->group, end = begin + w->group < w->in ? begin + w->group : w->in;
                for (int64_t k = begin; k < end; k++) line[column_of(w, k)] = stored[k] * scale + zero;
            }
            write_row(dense, o * w->in, line.data(), w->in, type);
        }
    }
}

}  // extern "C"
