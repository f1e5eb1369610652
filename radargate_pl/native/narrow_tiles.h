// Tiles of a product of 16-bit numbers in float32, for processors that multiply pairs of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "rows.h"

#if defined __AVX512BF16__

constexpr std::int64_t PANEL = 64;  // columns: four vectors of sums for each token
constexpr int TOKENS = 6;           // at a time: 24 sums of 32 registers

// `depth` rows of some columns in pairs: of columns 0 to 15 in rows 0 and 1, then 16 to 31, and so on. Zeros beyond.
inline void pack(const bfloat16* rows, std::int64_t depth, std::int64_t width, std::int64_t columns, bfloat16* packed) {
    std::uint16_t place[32];
    for (int i = 0; i < 32; ++i) place[i] = static_cast<std::uint16_t>(i / 2 + 32 * (i % 2));
    const __m512i low = _mm512_loadu_si512(place), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (std::int64_t row = 0; row < depth; row += 2)
        for (std::int64_t half = 0; half < PANEL; half += 32) {
            const std::int64_t left = std::clamp<std::int64_t>(columns - half, 0, 32);
            const __mmask32 mask = static_cast<__mmask32>((std::uint64_t(1) << left) - 1);
            const __m512i even = _mm512_maskz_loadu_epi16(mask, rows + row * width + half);
            const __m512i odd = _mm512_maskz_loadu_epi16(mask, rows + (row + 1) * width + half);
            bfloat16* to = packed + row * PANEL + 2 * half;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(even, high, odd));
        }
}

// N tokens times a packed panel: result[n * width + column] for its columns.
template <int N>
void tile(const bfloat16* x, std::int64_t depth, const bfloat16* packed, float scale, float* result, std::int64_t width,
          std::int64_t columns) {
    __m512 sums[N][4];
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < 4; ++i) sums[n][i] = _mm512_setzero_ps();
    for (std::int64_t row = 0; row < depth; row += 2) {
        __m512i pairs[4];
        for (int i = 0; i < 4; ++i) pairs[i] = _mm512_loadu_si512(packed + row * PANEL + 32 * i);
        for (int n = 0; n < N; ++n) {
            std::int32_t pair;
            std::memcpy(&pair, x + n * depth + row, sizeof pair);
            const __m512i both = _mm512_set1_epi32(pair);
            for (int i = 0; i < 4; ++i) sums[n][i] = _mm512_dpbf16_ps(sums[n][i], (__m512bh)both, (__m512bh)pairs[i]);
        }
    }
    for (int n = 0; n < N; ++n)
        for (int i = 0; i < 4; ++i) {
            const std::int64_t left = std::clamp<std::int64_t>(columns - 16 * i, 0, 16);
            const __mmask16 mask = static_cast<__mmask16>((std::uint32_t(1) << left) - 1);
            const __m512 scaled = _mm512_mul_ps(sums[n][i], _mm512_set1_ps(scale));
            _mm512_mask_storeu_ps(result + n * width + 16 * i, mask, scaled);
        }
}

#endif
