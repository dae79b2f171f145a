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

namespace {

enum Type : int32_t { F32 = 0, F16 = 1, BF16 = 2, I8 = 3 };

float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
    if (exponent == 31) bits = sign | 0x7f800000 | mantissa << 13;
    else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
    else {
        float value = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -value : value;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
#endif
}

uint16_t float_to_half(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, 0);
#else
    _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
#endif
}

float bfloat_to_float(uint16_t b) {
    uint32_t bits = uint32_t(b) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint16_t float_to_bfloat(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float read(const void *data, int64_t index, int32_t type) {
    if (type == F32) return static_cast<const float *>(data)[index];
    if (type == I8) return static_cast<const int8_t *>(data)[index];
    uint16_t bits = static_cast<const uint16_t *>(data)[index];
    return type == F16 ? half_to_float(bits) : bfloat_to_float(bits);
}

void write_row(void *data, int64_t at, const float *values, int64_t n, int32_t type) {
    if (type == F32) {
        std::memcpy(static_cast<float *>(data) + at, values, n * 4);
        return;
    }
    uint16_t *out = static_cast<uint16_t *>(data) + at;
    if (type == F16) for (int64_t i = 0; i < n; i++) out[i] = float_to_half(values[i]);
    else for (int64_t i = 0; i < n; i++) out[i] = float_to_bfloat(values[i]);
}

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

// sum over n codes of table[code] . x, both `width` floats wide
template <int width>
float dot(const uint8_t *codes, int64_t n, const float *table, const float *x) {
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
    if constexpr (width == 4) {
        __m128 sums[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
        for (; i + 4 <= n; i += 4)
            for (int k = 0; k < 4; k++)
                sums[k] = _mm_fmadd_ps(_mm_loadu_ps(table + 4 * codes[i + k]), _mm_loadu_ps(x + 4 * (i + k)), sums[k]);
        __m128 sum = _mm_add_ps(_mm_add_ps(sums[0], sums[1]), _mm_add_ps(sums[2], sums[3]));
        float parts[4];
        _mm_storeu_ps(parts, sum);
        total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    } else if constexpr (width == 8) {
        __m256 a = _mm256_setzero_ps(), b = a;
        for (; i + 2 <= n; i += 2) {
            a = _mm256_fmadd_ps(_mm256_loadu_ps(table + 8 * codes[i]), _mm256_loadu_ps(x + 8 * i), a);
            b = _mm256_fmadd_ps(_mm256_loadu_ps(table + 8 * codes[i + 1]), _mm256_loadu_ps(x + 8 * i + 8), b);
        }
        float parts[8];
        _mm256_storeu_ps(parts, _mm256_add_ps(a, b));
        for (float part : parts) total += part;
    }
#endif
    for (; i < n; i++)
        for (int k = 0; k < width; k++) total += table[width * codes[i] + k] * x[width * i + k];
    return total;
}

float dot_any(int32_t width, const uint8_t *codes, int64_t n, const float *table, const float *x) {
    switch (width) {
        case 1: return dot<1>(codes, n, table, x);
        case 2: return dot<2>(codes, n, table, x);
        case 4: return dot<4>(codes, n, table, x);
        default: return dot<8>(codes, n, table, x);
    }
}

}  // namespace

extern "C" {

struct Weight {
    const uint8_t *packed;   // [out, row_bytes]
    const float *table;      // [2^bits, width]
    const void *scales;      // [out, groups]
    const void *zeros;       // [out, groups] or null
    const void *perm;        // [in] or null
    const void *lr_a;        // [rank, in] or null
    const void *lr_b;        // [out, rank]
    const float *lr_scale;   // [rank] or null; int8 factors have one
    int64_t out, in, row_bytes, group, groups, rank;
    int32_t bits, size, width, scale_type, perm_bytes, lr_type;
};

// y [rows, out] = x [rows, in] times the weight, low-rank term included
void gemv(const Weight *w, const void *x, void *y, int64_t rows, int32_t type, int32_t threads) {
    const int64_t codes_in_row = (w->in + w->size - 1) / w->size, group_codes = w->group / w->size;
    const int64_t laid = codes_in_row * w->width;
    std::vector<float> inputs(rows * laid, 0.0f), sums(rows * w->groups, 0.0f), low(rows * w->rank, 0.0f);
    std::vector<float> line(w->in), result(rows * w->out);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t j = 0; j < w->in; j++) line[j] = read(x, r * w->in + j, type);
        for (int64_t k = 0; k < w->in; k++) {
            int64_t column = !w->perm ? k : w->perm_bytes == 2 ? static_cast<const int16_t *>(w->perm)[k]
                                                               : static_cast<const int32_t *>(w->perm)[k];
            inputs[r * laid + k / w->size * w->width + k % w->size] = line[column];
            sums[r * w->groups + k / w->group] += line[column];
        }
        for (int64_t i = 0; i < w->rank; i++) {
            float total = 0;
            if (w->lr_type == F32) {
                const float *a = static_cast<const float *>(w->lr_a) + i * w->in;
#pragma omp simd reduction(+ : total)
                for (int64_t j = 0; j < w->in; j++) total += a[j] * line[j];
            } else if (w->lr_type == I8) {
                const int8_t *a = static_cast<const int8_t *>(w->lr_a) + i * w->in;
#pragma omp simd reduction(+ : total)
                for (int64_t j = 0; j < w->in; j++) total += float(a[j]) * line[j];
            } else {
                const _Float16 *a = static_cast<const _Float16 *>(w->lr_a) + i * w->in;
#pragma omp simd reduction(+ : total)
                for (int64_t j = 0; j < w->in; j++) total += float(a[j]) * line[j];
            }
            low[r * w->rank + i] = w->lr_scale ? total * w->lr_scale[i] : total;
        }
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> codes(codes_in_row + 8);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < w->out; o++) {
            unpack_row(w->packed + o * w->row_bytes, w->row_bytes, w->bits, codes_in_row, codes.data());
            for (int64_t r = 0; r < rows; r++) {
                float total = 0;
                for (int64_t g = 0; g < w->groups; g++) {
                    int64_t first = g * group_codes;
                    int64_t n = w->groups == 1 || codes_in_row - first < group_codes ? codes_in_row - first : group_codes;
                    const float *at = inputs.data() + r * laid + first * w->width;
                    float part = dot_any(w->width, codes.data() + first, n, w->table, at);
                    total += part * read(w->scales, o * w->groups + g, w->scale_type);
                    if (w->zeros) total += sums[r * w->groups + g] * read(w->zeros, o * w->groups + g, w->scale_type);
                }
                for (int64_t i = 0; i < w->rank; i++)
                    total += low[r * w->rank + i] * read(w->lr_b, o * w->rank + i, w->lr_type);
                result[r * w->out + o] = total;
            }
        }
    }
    write_row(y, 0, result.data(), rows * w->out, type);
}

// dense [out, in] in stored order, without the low-rank term
void decode(const Weight *w, void *dense, int32_t type, int32_t threads) {
    const int64_t codes_in_row = (w->in + w->size - 1) / w->size;
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint8_t> codes(codes_in_row + 8);
        std::vector<float> line(codes_in_row * w->size + 8);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < w->out; o++) {
            unpack_row(w->packed + o * w->row_bytes, w->row_bytes, w->bits, codes_in_row, codes.data());
            float *to = line.data();
            switch (w->width) {  // a whole padded codeword is copied; the next one overwrites what is too much
                case 1: for (int64_t i = 0; i < codes_in_row; i++) to[i] = w->table[codes[i]]; break;
                case 2: for (int64_t i = 0; i < codes_in_row; i++) std::memcpy(to + 2 * i, w->table + 2 * codes[i], 8); break;
                case 4:
                    for (int64_t i = 0; i < codes_in_row; i++)
                        std::memcpy(to + w->size * i, w->table + 4 * codes[i], 16);
                    break;
                default:
                    for (int64_t i = 0; i < codes_in_row; i++)
                        std::memcpy(to + w->size * i, w->table + 8 * codes[i], 32);
            }
            for (int64_t g = 0; g < w->groups; g++) {
                float scale = read(w->scales, o * w->groups + g, w->scale_type);
                int64_t begin = g * w->group, end = begin + w->group < w->in ? begin + w->group : w->in;
                for (int64_t k = begin; k < end; k++) to[k] *= scale;
                if (!w->zeros) continue;
                float zero = read(w->zeros, o * w->groups + g, w->scale_type);
                for (int64_t k = begin; k < end; k++) to[k] += zero;
            }
            write_row(dense, o * w->in, to, w->in, type);
        }
    }
}

}  // extern "C"
