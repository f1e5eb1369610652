// Products with rows that lie one after the other, in the dtype they are stored in, and the cosine and sine of a row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

struct bfloat16 {
    std::uint16_t bits;
};

inline float widened(float value) { return value; }
inline double widened(double value) { return value; }
inline float widened(bfloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// x times each of `count` rows. Four rows at a time: one sum alone would wait for itself.
template <class stored, class real>
void dots(const stored* rows, std::int64_t count, const real* x, real* result, std::int64_t width) {
    std::int64_t row = 0;
    for (; row + 4 <= count; row += 4) {
        const stored *a = rows + row * width, *b = a + width, *c = b + width, *d = c + width;
        real sum_a = 0, sum_b = 0, sum_c = 0, sum_d = 0;
#pragma omp simd reduction(+ : sum_a, sum_b, sum_c, sum_d)
        for (std::int64_t i = 0; i < width; ++i) {
            sum_a += widened(a[i]) * x[i];
            sum_b += widened(b[i]) * x[i];
            sum_c += widened(c[i]) * x[i];
            sum_d += widened(d[i]) * x[i];
        }
        result[row] = sum_a, result[row + 1] = sum_b, result[row + 2] = sum_c, result[row + 3] = sum_d;
    }
    for (; row < count; ++row) {
        const stored* a = rows + row * width;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (std::int64_t i = 0; i < width; ++i) sum += widened(a[i]) * x[i];
        result[row] = sum;
    }
}

// result += sum of `count` rows times their factors; a row begins `stride` after the one before.
template <class stored, class real>
void add_rows(const stored* rows, std::int64_t count, const real* factors, real* result, std::int64_t width,
              std::int64_t stride) {
    std::int64_t row = 0;
    for (; row + 4 <= count; row += 4) {
        const stored *a = rows + row * stride, *b = a + stride, *c = b + stride, *d = c + stride;
        const real f = factors[row], g = factors[row + 1], h = factors[row + 2], k = factors[row + 3];
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i)
            result[i] += (f * widened(a[i]) + g * widened(b[i])) + (h * widened(c[i]) + k * widened(d[i]));
    }
    for (; row < count; ++row) {
        const stored* a = rows + row * stride;
        const real f = factors[row];
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i) result[i] += f * widened(a[i]);
    }
}

template <class stored, class real>
void add_rows(const stored* rows, std::int64_t count, const real* factors, real* result, std::int64_t width) {
    add_rows(rows, count, factors, result, width, width);
}

// rows += factors^T x.
template <class real>
void add_outer(real* rows, std::int64_t count, const real* factors, const real* x, std::int64_t width) {
    for (std::int64_t row = 0; row < count; ++row) {
        real* a = rows + row * width;
        const real f = factors[row];
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i) a[i] += f * x[i];
    }
}

inline void cos_sin(const double* angle, double* cosine, double* sine, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) cosine[i] = std::cos(angle[i]), sine[i] = std::sin(angle[i]);
}

// Polynomials of Cephes on [-pi/4, pi/4], where compilers make vectors of them; the library's far outside and for NaN.
inline void cos_sin(const float* angle, float* cosine, float* sine, std::int64_t count) {
    int far = 0;
#pragma omp simd reduction(+ : far)
    for (std::int64_t i = 0; i < count; ++i) far += !(std::fabs(angle[i]) <= 8192.0f);
    if (far) {
        for (std::int64_t i = 0; i < count; ++i) cosine[i] = std::cos(angle[i]), sine[i] = std::sin(angle[i]);
        return;
    }
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
        const float quarters = std::rint(angle[i] * 0.63661977236758134f);
        float x = angle[i] - quarters * 1.5703125f;  // pi / 2 in three parts, the first two without rounding
        x -= quarters * 4.837512969970703125e-4f;
        x -= quarters * 7.54978995489188216e-8f;
        const float square = x * x;
        const float odd =
            x + x * square * (-1.6666654611e-1f + square * (8.3321608736e-3f - square * 1.9515295891e-4f));
        const float even =
            1.0f - 0.5f * square +
            square * square * (4.166664568298827e-2f + square * (-1.388731625493765e-3f + square * 2.443315711809948e-5f));
        const std::int32_t quadrant = static_cast<std::int32_t>(quarters);
        const float of_sine = quadrant & 1 ? even : odd, of_cosine = quadrant & 1 ? odd : even;
        sine[i] = quadrant & 2 ? -of_sine : of_sine;
        cosine[i] = (quadrant + 1) & 2 ? -of_cosine : of_cosine;
    }
}
