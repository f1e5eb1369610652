// The updates of several mixture layers that read one input, for a few tokens: gate, kept experts, rotation and sum in
// one call. A step is bound by the weights it reads: every one is read once, where its bank keeps it and as it is
// stored. decode_step.py states the arguments; decode_mixture.py has the same in tensor operations.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "rotation.h"

namespace {

constexpr std::int64_t BLOCK = 32;  // rows, or columns, that one thread takes at a time

template <class real, class stored>
struct Member {
    std::int64_t experts, rank, in_, out, turns, kept;
    std::int64_t is_normed, renormalizes;
    real eps, temperature, output_scale, angle_bound;
    const real* theta;    // (experts, in)
    const stored* A;      // (experts * rank, in)
    const stored* B;      // (experts * rank, out)
    const real* scaling;  // (experts)
    const real* P;        // (turns, out)
    const real* Q;        // (turns, out / 2)
    const real* W_sum;    // (out, in), or null: S from all latents
    real* updates;        // (tokens, out)

    bool rotates() const { return turns > 0; }
    bool needs_all_latents() const { return rotates() && !W_sum; }
};

// What is in between, for all tokens of one member.
template <class real>
struct Buffers {
    std::vector<real> logits, latents, total, kept_latents, weights;
    std::vector<std::int64_t> indices;

    template <class stored>
    void fit(const Member<real, stored>& of, std::int64_t tokens) {
        logits.resize(tokens * of.experts);
        latents.resize(of.needs_all_latents() ? tokens * of.experts * of.rank : 0);
        total.resize(of.rotates() ? tokens * of.out : 0);
        kept_latents.resize(tokens * of.kept * of.rank);
        weights.resize(tokens * of.kept);
        indices.resize(tokens * of.kept);
    }
};

// A latent as the model in its own dtype would round it.
inline float rounded(float value, const float*) { return value; }
inline double rounded(double value, const double*) { return value; }
inline float rounded(float value, const bfloat16*) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isnan(value)) return value;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;  // to the nearest, ties to even
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

// Products of all tokens with `count` rows, in blocks of rows that threads take.
template <class real, class stored>
void all_dots(const stored* rows, std::int64_t count, const real* x, std::int64_t tokens, std::int64_t width,
              real* result) {
#pragma omp for schedule(static) nowait
    for (std::int64_t first = 0; first < count; first += BLOCK)
        for (std::int64_t token = 0; token < tokens; ++token)
            dots<1>(Rows<const stored>{rows + first * width, width}, std::min(BLOCK, count - first),
                    Rows<const real>{x + token * width, width}, result + token * count + first, width);
}

// The most probable experts of one token in falling order, equal ones by index, and their weights.
template <class real, class stored>
void select(const Member<real, stored>& of, const real* logits, real* weights, std::int64_t* indices) {
    std::vector<real> scaled(of.experts);
    for (std::int64_t i = 0; i < of.experts; ++i) scaled[i] = logits[i] / of.temperature;
    std::vector<std::int64_t> order(of.experts);
    std::iota(order.begin(), order.end(), 0);
    if (of.kept < of.experts)  // NaN first, as torch sorts
        std::partial_sort(order.begin(), order.begin() + of.kept, order.end(), [&](std::int64_t a, std::int64_t b) {
            const bool is_nan_a = std::isnan(scaled[a]), is_nan_b = std::isnan(scaled[b]);
            if (is_nan_a || is_nan_b) return is_nan_a != is_nan_b ? is_nan_a : a < b;
            return scaled[a] != scaled[b] ? scaled[a] > scaled[b] : a < b;
        });
    const std::int64_t shared = of.renormalizes ? of.kept : of.experts;  // whose weights are 1 together
    real largest = scaled[order[0]], sum = 0;
    for (std::int64_t i = 0; i < of.experts; ++i) largest = std::max(largest, scaled[i]);
    for (std::int64_t i = 0; i < shared; ++i) sum += std::exp(scaled[order[i]] - largest);
    for (std::int64_t i = 0; i < of.kept; ++i) {
        indices[i] = order[i];
        weights[i] = of.output_scale * std::exp(scaled[order[i]] - largest) / sum;
    }
}

template <class real, class stored>
void read_input(const Member<real, stored>& of, const real* x, std::int64_t tokens, Buffers<real>& to) {
    all_dots(of.theta, of.experts, x, tokens, of.in_, to.logits.data());
    if (of.needs_all_latents()) all_dots(of.A, of.experts * of.rank, x, tokens, of.in_, to.latents.data());
    if (of.W_sum) all_dots(of.W_sum, of.out, x, tokens, of.in_, to.total.data());
}

// Weights and scaled latents of the kept experts; all latents scaled.
template <class real, class stored>
void choose(const Member<real, stored>& of, const real* x, std::int64_t token, Buffers<real>& to) {
    const std::int64_t first = token * of.kept;
    select(of, &to.logits[token * of.experts], &to.weights[first], &to.indices[first]);
    real* all = of.needs_all_latents() ? &to.latents[token * of.experts * of.rank] : nullptr;
    for (std::int64_t i = 0; all && i < of.experts * of.rank; ++i)
        all[i] = rounded(all[i], of.A) * of.scaling[i / of.rank];
    for (std::int64_t place = first; place < first + of.kept; ++place) {
        const std::int64_t expert = to.indices[place];
        real* kept = &to.kept_latents[place * of.rank];
        if (all) {
            std::copy(all + expert * of.rank, all + (expert + 1) * of.rank, kept);
            continue;
        }
        dots<1>(Rows<const stored>{of.A + expert * of.rank * of.in_, of.in_}, of.rank,
                Rows<const real>{x + token * of.in_, of.in_}, kept, of.in_);
        for (std::int64_t i = 0; i < of.rank; ++i) kept[i] = rounded(kept[i], of.A) * of.scaling[expert];
    }
}

template <class real, class stored>
void sum_all(const Member<real, stored>& of, std::int64_t tokens, Buffers<real>& to) {
    const std::int64_t rows = of.experts * of.rank;
#pragma omp for schedule(static) nowait
    for (std::int64_t first = 0; first < of.out; first += BLOCK)
        for (std::int64_t token = 0; token < tokens; ++token) {
            const std::int64_t width = std::min(BLOCK, of.out - first);
            real* part = &to.total[token * of.out + first];
            std::fill(part, part + width, real(0));
            add_rows<1>(Rows<const stored>{of.B + first, of.out}, rows, &to.latents[token * rows],
                        Rows<real>{part, width}, width);
        }
}

template <class real, class stored>
void mix(const Member<real, stored>& of, std::int64_t token, const Buffers<real>& from) {
    const Mixture<real, stored> mixture{1, of.kept, of.rank, of.out, of.turns, of.is_normed != 0, of.eps,
            of.angle_bound, from.total.data(), from.kept_latents.data(), from.weights.data(),
            from.indices.data(), of.B, of.P, of.Q};
    if (of.rotates()) {
        Slots<real, stored>(mixture).mix(token, token + 1, of.updates);
        return;
    }
    real* update = of.updates + token * of.out;
    std::fill(update, update + of.out, real(0));
    std::vector<real> factors(of.rank);
    for (std::int64_t place = token * of.kept; place < (token + 1) * of.kept; ++place) {
        for (std::int64_t i = 0; i < of.rank; ++i)
            factors[i] = mixture.latents[place * of.rank + i] * mixture.weights[place];
        add_rows<1>(mixture.rows(place), of.rank, factors.data(), Rows<real>{update, of.out}, of.out);
    }
}

template <class real, class stored>
void decode(const Member<real, stored>* members, std::int64_t count, const stored* input, std::int64_t tokens,
            int threads) {
    std::vector<real> x(tokens * members[0].in_);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = widened(input[i]);
    std::vector<Buffers<real>> buffers(count);
    for (std::int64_t i = 0; i < count; ++i) buffers[i].fit(members[i], tokens);
#pragma omp parallel num_threads(threads)
    {
        for (std::int64_t i = 0; i < count; ++i) read_input(members[i], x.data(), tokens, buffers[i]);
#pragma omp barrier
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < count * tokens; ++i)
            choose(members[i / tokens], x.data(), i % tokens, buffers[i / tokens]);
        for (std::int64_t i = 0; i < count; ++i)
            if (members[i].needs_all_latents()) sum_all(members[i], tokens, buffers[i]);
#pragma omp barrier
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < count * tokens; ++i) mix(members[i / tokens], i % tokens, buffers[i / tokens]);
    }
}

}  // namespace

#define DECODE(name, real, stored)                                                                                    \
    extern "C" void decode_step_##name(const void* members, std::int64_t count, const stored* x, std::int64_t tokens, \
                                       int threads) {                                                                 \
        decode(static_cast<const Member<real, stored>*>(members), count, x, tokens, threads);                         \
    }

DECODE(float32, float, float)
DECODE(bfloat16, float, bfloat16)
DECODE(float64, double, double)
