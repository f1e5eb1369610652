// The mixture of rotated experts and its gradients, one token after the other: nothing as wide as a layer leaves the
// nearest cache between the rows of B and the result. turned_sum.py states the formulas and the shapes; the same in
// tensor operations is fast_rotation.py, and the readable form rotations.py. Tests hold all of them together.
//
// The gradient of a slot, with G that of the mixture, w = S - v, c = 1 / (rms(v) rms(w)), D = c (da Q^T) P^T, and the
// pulls of both norms, alpha v and beta w, follows arXiv 2505.23184, eq. 38-39:
//   dg = <v, R^T G>,  da = g v x (R^T G) in every plane,  dS = D v + beta w,  dv = g R^T G + D w + alpha v - dS.

#include <omp.h>

#include "rotation.h"

namespace {

template <class real, class stored>
void mix(const Mixture<real, stored>& of, real* mixed, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Slot<real, stored> slot(of);
#pragma omp for schedule(static)
        for (std::int64_t token = 0; token < of.tokens; ++token) {
            real* row = mixed + token * of.out;
            std::fill(row, row + of.out, real(0));
            for (std::int64_t place = token * of.kept; place < (token + 1) * of.kept; ++place) {
                slot.make(token, place);
                slot.add_rotated(of.weights[place], row);
            }
        }
    }
}

template <class real>
struct Gradients {
    real *total, *latents, *weights, *P, *Q;
};

// The gradients of one slot; adds to those of S, P and Q.
template <class real, class stored>
struct SlotGradient {
    Slot<real, stored> slot;
    std::vector<real> back, of_angles, of_v, D, of_z, of_raw, weighted_z;

    explicit SlotGradient(const Mixture<real, stored>& of)
        : slot(of), back(of.out), of_angles(of.planes()), of_v(of.out), D(of.out), of_z(of.turns), of_raw(of.turns),
          weighted_z(of.turns) {}

    // R^T G into `back`, the angles' gradient without the weight, and the weight's.
    real turn_back(const real* grad) {
        const std::int64_t planes = slot.of.planes(), last = slot.of.out - 1;
        real of_weight = 0;
#pragma omp simd reduction(+ : of_weight)
        for (std::int64_t i = 0; i < planes; ++i) {
            const real even = grad[2 * i] * slot.cosine[i] + grad[2 * i + 1] * slot.sine[i];
            const real odd = grad[2 * i + 1] * slot.cosine[i] - grad[2 * i] * slot.sine[i];
            of_angles[i] = slot.v[2 * i] * odd - slot.v[2 * i + 1] * even;
            of_weight += slot.v[2 * i] * even + slot.v[2 * i + 1] * odd;
            back[2 * i] = even;
            back[2 * i + 1] = odd;
        }
        if (slot.of.out % 2) {
            back[last] = grad[last];
            of_weight += slot.v[last] * back[last];
        }
        return of_weight;
    }

    void add(std::int64_t token, std::int64_t place, const real* grad, const Gradients<real>& sums) {
        const auto& of = slot.of;
        const real weight = of.weights[place];
        slot.make(token, place);
        sums.weights[place] = turn_back(grad);
        dots(of.Q, of.turns, of_angles.data(), of_z.data(), of.planes());
        real pull = 0;
        const real scale = slot.inverse_v * slot.inverse_others;
        for (std::int64_t i = 0; i < of.turns; ++i) {
            of_z[i] *= weight;
            of_raw[i] = of_z[i] * scale;
            weighted_z[i] = slot.z[i] * weight;
            pull -= of_z[i] * slot.raw[i] / of.out;
        }
        if (!of.is_normed) pull = 0;
        add_outer(sums.Q, of.turns, weighted_z.data(), of_angles.data(), of.planes());
        add_outer(sums.P, of.turns, of_raw.data(), slot.product.data(), of.out);
        std::fill(D.begin(), D.end(), real(0));
        add_rows(of.P, of.turns, of_raw.data(), D.data(), of.out);
        const real alpha = pull * scale * slot.inverse_v * slot.inverse_v;
        const real beta = pull * scale * slot.inverse_others * slot.inverse_others;
        real* of_total = sums.total + token * of.out;
#pragma omp simd
        for (std::int64_t i = 0; i < of.out; ++i) {
            const real of_S = D[i] * slot.v[i] + beta * slot.others[i];
            of_total[i] += of_S;
            of_v[i] = weight * back[i] + D[i] * slot.others[i] + alpha * slot.v[i] - of_S;
        }
        dots(of.rows(place), of.rank, of_v.data(), sums.latents + place * of.rank, of.out);
    }
};

template <class real, class stored>
void add_gradients(const Mixture<real, stored>& of, const real* grad, const Gradients<real>& result, int threads) {
    // Every thread has sums of its own, added up in their order: the same numbers in every run with as many threads.
    const std::int64_t size_P = of.turns * of.out, size = size_P + of.turns * of.planes();
    threads = static_cast<int>(std::clamp<std::int64_t>(of.tokens, 1, threads));
    std::vector<real> sums(static_cast<std::size_t>(threads) * size);
#pragma omp parallel num_threads(threads)
    {
        real* own = sums.data() + omp_get_thread_num() * size;
        const Gradients<real> gradients{result.total, result.latents, result.weights, own, own + size_P};
        SlotGradient<real, stored> slot(of);
#pragma omp for schedule(static)
        for (std::int64_t token = 0; token < of.tokens; ++token) {
            std::fill(result.total + token * of.out, result.total + (token + 1) * of.out, real(0));
            for (std::int64_t place = token * of.kept; place < (token + 1) * of.kept; ++place)
                slot.add(token, place, grad + token * of.out, gradients);
        }
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < size; ++i) {
            real sum = 0;
            for (int thread = 0; thread < threads; ++thread) sum += sums[thread * size + i];
            (i < size_P ? result.P[i] : result.Q[i - size_P]) = sum;
        }
    }
}

// result[token] = sum of the rows of its kept experts, times their factors.
template <class real, class stored>
void gathered_sums(std::int64_t tokens, std::int64_t kept, std::int64_t rank, std::int64_t width, const real* factors,
                   const std::int64_t* indices, const stored* matrix, real* result, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t token = 0; token < tokens; ++token) {
        real* row = result + token * width;
        std::fill(row, row + width, real(0));
        for (std::int64_t place = token * kept; place < (token + 1) * kept; ++place)
            add_rows(matrix + indices[place] * rank * width, rank, factors + place * rank, row, width);
    }
}

// result[token] = the token times each row of its kept experts.
template <class real, class stored>
void gathered_dots(std::int64_t tokens, std::int64_t kept, std::int64_t rank, std::int64_t width, const real* wide,
                   const std::int64_t* indices, const stored* matrix, real* result, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t place = 0; place < tokens * kept; ++place)
        dots(matrix + indices[place] * rank * width, rank, wide + place / kept * width, result + place * rank, width);
}

}  // namespace

#define GATHERED(name, real, stored)                                                                                 \
    extern "C" void gathered_sums_##name(std::int64_t tokens, std::int64_t kept, std::int64_t rank,                  \
                                         std::int64_t width, const real* factors, const std::int64_t* indices,       \
                                         const stored* matrix, real* result, int threads) {                          \
        gathered_sums(tokens, kept, rank, width, factors, indices, matrix, result, threads);                         \
    }                                                                                                                \
    extern "C" void gathered_dots_##name(std::int64_t tokens, std::int64_t kept, std::int64_t rank,                  \
                                         std::int64_t width, const real* wide, const std::int64_t* indices,          \
                                         const stored* matrix, real* result, int threads) {                          \
        gathered_dots(tokens, kept, rank, width, wide, indices, matrix, result, threads);                            \
    }

#define TURNED_SUM(name, real, stored)                                                                               \
    extern "C" void turned_sum_##name(std::int64_t tokens, std::int64_t kept, std::int64_t rank, std::int64_t out,   \
                                      std::int64_t turns, bool is_normed, double eps, const real* total,             \
                                      const real* latents, const real* weights, const std::int64_t* indices,         \
                                      const stored* B, const real* P, const real* Q, real* mixed, int threads) {     \
        const Mixture<real, stored> of{tokens, kept,    rank,    out, turns, is_normed, static_cast<real>(eps), 0,      \
                                       total, latents, weights, indices, B, P, Q};                                    \
        mix(of, mixed, threads);                                                                                     \
    }                                                                                                                \
    extern "C" void turned_sum_gradients_##name(                                                                     \
        std::int64_t tokens, std::int64_t kept, std::int64_t rank, std::int64_t out, std::int64_t turns,             \
        bool is_normed, double eps, const real* total, const real* latents, const real* weights,                     \
        const std::int64_t* indices, const stored* B, const real* P, const real* Q, const real* grad, real* of_total, \
        real* of_latents, real* of_weights, real* of_P, real* of_Q, int threads) {                                   \
        const Mixture<real, stored> of{tokens, kept,    rank,    out, turns, is_normed, static_cast<real>(eps), 0,      \
                                       total, latents, weights, indices, B, P, Q};                                    \
        add_gradients(of, grad, Gradients<real>{of_total, of_latents, of_weights, of_P, of_Q}, threads);             \
    }

GATHERED(float32, float, float)
GATHERED(bfloat16, float, bfloat16)
GATHERED(float64, double, double)
TURNED_SUM(float32, float, float)
TURNED_SUM(bfloat16, float, bfloat16)
TURNED_SUM(float64, double, double)
