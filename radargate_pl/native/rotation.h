// One kept output of one token and its rotation, a = c ((v * (S - v)) P) Q: what training and decoding share.

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "rows.h"

template <class real, class stored>
struct Mixture {
    std::int64_t tokens, kept, rank, out, turns;
    bool is_normed;
    real eps, bound;  // of angles in radians; 0 for none
    const real *total, *latents, *weights;
    const std::int64_t* indices;
    const stored* B;
    const real *P, *Q;

    std::int64_t planes() const { return out / 2; }
    const stored* rows(std::int64_t place) const {
        const std::int64_t expert = indices ? indices[place] : place % kept;
        return B + expert * rank * out;
    }
};

// One kept output of one token and its rotation.
template <class real, class stored>
struct Slot {
    const Mixture<real, stored>& of;
    std::vector<real> v, others, product, angles, cosine, sine, raw, z;
    real inverse_v = 1, inverse_others = 1;

    explicit Slot(const Mixture<real, stored>& mixture)
        : of(mixture), v(of.out), others(of.out), product(of.out), angles(of.planes()), cosine(of.planes()),
          sine(of.planes()), raw(of.turns), z(of.turns) {}

    void make(std::int64_t token, std::int64_t place) {
        const real* total = of.total + token * of.out;
        std::fill(v.begin(), v.end(), real(0));
        add_rows(of.rows(place), of.rank, of.latents + place * of.rank, v.data(), of.out);
        real square_v = 0, square_others = 0;
#pragma omp simd reduction(+ : square_v, square_others)
        for (std::int64_t i = 0; i < of.out; ++i) {
            others[i] = total[i] - v[i];
            product[i] = v[i] * others[i];
            square_v += v[i] * v[i];
            square_others += others[i] * others[i];
        }
        if (of.is_normed) {
            inverse_v = 1 / std::sqrt(square_v / of.out + of.eps);
            inverse_others = 1 / std::sqrt(square_others / of.out + of.eps);
        }
        dots(of.P, of.turns, product.data(), raw.data(), of.out);
        for (std::int64_t i = 0; i < of.turns; ++i) z[i] = raw[i] * (inverse_v * inverse_others);
        std::fill(angles.begin(), angles.end(), real(0));
        add_rows(of.Q, of.turns, z.data(), angles.data(), of.planes());
        if (of.bound > 0)
            for (real& angle : angles) angle = of.bound * std::tanh(angle / of.bound);
        cos_sin(angles.data(), cosine.data(), sine.data(), of.planes());
    }

    void add_rotated(real weight, real* mixed) const {
#pragma omp simd
        for (std::int64_t i = 0; i < of.planes(); ++i) {
            const real even = v[2 * i], odd = v[2 * i + 1];
            mixed[2 * i] += weight * (even * cosine[i] - odd * sine[i]);
            mixed[2 * i + 1] += weight * (even * sine[i] + odd * cosine[i]);
        }
        if (of.out % 2) mixed[of.out - 1] += weight * v[of.out - 1];
    }
};
