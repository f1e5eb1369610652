// Kept outputs of tokens and their rotations, a = c ((v * (S - v)) P) Q: what training and decoding share.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cos_sin.h"
#include "products.h"

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
    std::int64_t token_of(std::int64_t place) const { return place / kept; }
    Rows<const stored> rows(std::int64_t place) const {
        const std::int64_t expert = indices ? indices[place] : place % kept;
        return {B + expert * rank * out, out};
    }
    Rows<const real> rows_of_P() const { return {P, out}; }
    Rows<const real> rows_of_Q() const { return {Q, planes()}; }
};

constexpr int SLOTS = 4;  // at a time: P, Q and their gradients are read once for so many

// Calls `function(place, N)` for all places from first to last, with N of them at a time.
template <class Function>
void in_blocks(std::int64_t first, std::int64_t last, Function function) {
    for (; first + SLOTS <= last; first += SLOTS) function(first, std::integral_constant<int, SLOTS>());
    for (; first < last; ++first) function(first, std::integral_constant<int, 1>());
}

// A few kept outputs and their rotations: a row of every block for each.
template <class real, class stored>
struct Slots {
    const Mixture<real, stored>& of;
    Block<real> v, others, product, angles, cosine, sine;
    std::vector<real> raw, z;
    real inverse_v[SLOTS], inverse_others[SLOTS];

    explicit Slots(const Mixture<real, stored>& mixture)
        : of(mixture),
          v(SLOTS, of.out),
          others(SLOTS, of.out),
          product(SLOTS, of.out),
          angles(SLOTS, of.planes()),
          cosine(SLOTS, of.planes()),
          sine(SLOTS, of.planes()),
          raw(SLOTS * of.turns),
          z(SLOTS * of.turns) {}

    // The outputs of N places and their angles.
    template <int N>
    void make(std::int64_t place) {
        v.clear(N);
        for (int n = 0; n < N; ++n) make_output(n, place + n);
        dots<N, 8 / N, real, real>(of.rows_of_P(), of.turns, product.rows(), raw.data(), of.out);
        for (int n = 0; n < N; ++n)
            for (std::int64_t i = n * of.turns; i < (n + 1) * of.turns; ++i)
                z[i] = raw[i] * (inverse_v[n] * inverse_others[n]);
        angles.clear(N);
        add_rows<N>(of.rows_of_Q(), of.turns, z.data(), angles.rows(), of.planes());
        const std::int64_t count = N * angles.stride;
        for (std::int64_t i = 0; of.bound > 0 && i < count; ++i)
            angles[0][i] = of.bound * std::tanh(angles[0][i] / of.bound);
        // One after the other: angles that are far out are computed otherwise, and are nobody else's matter.
        for (int n = 0; n < N; ++n) cos_sin(angles[n], cosine[n], sine[n], of.planes());
    }

    void make_output(int n, std::int64_t place) {
        const real* total = of.total + of.token_of(place) * of.out;
        real *v_ = v[n], *others_ = others[n], *product_ = product[n];
        add_rows<1>(of.rows(place), of.rank, of.latents + place * of.rank, v.rows().from(n), of.out);
        real square_v = 0, square_others = 0;
#pragma omp simd reduction(+ : square_v, square_others)
        for (std::int64_t i = 0; i < of.out; ++i) {
            others_[i] = total[i] - v_[i];
            product_[i] = v_[i] * others_[i];
            square_v += v_[i] * v_[i];
            square_others += others_[i] * others_[i];
        }
        inverse_v[n] = of.is_normed ? 1 / std::sqrt(square_v / of.out + of.eps) : 1;
        inverse_others[n] = of.is_normed ? 1 / std::sqrt(square_others / of.out + of.eps) : 1;
    }

    void add_rotated(int n, real weight, real* mixed) const {
        const real *v_ = v[n], *cosine_ = cosine[n], *sine_ = sine[n];
#pragma omp simd
        for (std::int64_t i = 0; i < of.planes(); ++i) {
            const real even = v_[2 * i], odd = v_[2 * i + 1];
            mixed[2 * i] += weight * (even * cosine_[i] - odd * sine_[i]);
            mixed[2 * i + 1] += weight * (even * sine_[i] + odd * cosine_[i]);
        }
        if (of.out % 2) mixed[of.out - 1] += weight * v_[of.out - 1];
    }

    // The mixture of some tokens: result + token * out.
    void mix(std::int64_t first, std::int64_t last, real* mixed) {
        std::fill(mixed + first * of.out, mixed + last * of.out, real(0));
        in_blocks(first * of.kept, last * of.kept, [&](std::int64_t place, auto count) {
            constexpr int N = decltype(count)::value;
            make<N>(place);
            for (int n = 0; n < N; ++n) add_rotated(n, of.weights[place + n], mixed + of.token_of(place + n) * of.out);
        });
    }
};
