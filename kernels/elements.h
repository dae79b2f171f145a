// Elements of a tensor of any stored type, read as float and written from float. Included by C++ files of this folder.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

enum Type : int32_t { F32 = 0, F16 = 1, BF16 = 2, I8 = 3 };  // TYPES and FACTOR_TYPES of native_weight.py

inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    _Float16 half;
    std::memcpy(&half, &h, 2);
    return float(half);
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, 0);
#else
    const _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
#endif
}

inline float bfloat_to_float(uint16_t b) {
    const uint32_t bits = uint32_t(b) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t float_to_bfloat(float value) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float read(const void *data, int64_t at, int32_t type) {
    if (type == F32) return static_cast<const float *>(data)[at];
    if (type == I8) return static_cast<const int8_t *>(data)[at];
    const uint16_t bits = static_cast<const uint16_t *>(data)[at];
    return type == F16 ? half_to_float(bits) : bfloat_to_float(bits);
}

inline void write(void *data, int64_t at, float value, int32_t type) {
    if (type == F32) static_cast<float *>(data)[at] = value;
    else static_cast<uint16_t *>(data)[at] = type == F16 ? float_to_half(value) : float_to_bfloat(value);
}

inline void read_row(const void *data, int64_t at, float *values, int64_t n, int32_t type) {
    if (type == F32) std::memcpy(values, static_cast<const float *>(data) + at, n * 4);
    else for (int64_t i = 0; i < n; i++) values[i] = read(data, at + i, type);
}

inline void write_row(void *data, int64_t at, const float *values, int64_t n, int32_t type) {
    if (type == F32) std::memcpy(static_cast<float *>(data) + at, values, n * 4);
    else for (int64_t i = 0; i < n; i++) write(data, at + i, values[i], type);
}

inline int64_t read_index(const void *data, int64_t at, int32_t bytes) {
    return bytes == 2 ? static_cast<const int16_t *>(data)[at] : static_cast<const int32_t *>(data)[at];
}

}  // namespace
