// The cosine and sine of a row of angles.

#pragma once

#include <cmath>
#include <cstdint>

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
            square * square *
                (4.166664568298827e-2f + square * (-1.388731625493765e-3f + square * 2.443315711809948e-5f));
        const std::int32_t quadrant = static_cast<std::int32_t>(quarters);
        const float of_sine = quadrant & 1 ? even : odd, of_cosine = quadrant & 1 ? odd : even;
        sine[i] = quadrant & 2 ? -of_sine : of_sine;
        cosine[i] = (quadrant + 1) & 2 ? -of_cosine : of_cosine;
    }
}
