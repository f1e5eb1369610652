// The mixture of rotated experts and its gradients, a few kept outputs at a time: nothing as wide as a layer leaves the
// nearest caches between the rows of B and the result. turned_sum.py states the formulas and the shapes; the same in
// tensor operations is fast_rotation.py, and the readable form rotations.py. Tests hold all of them together.
//
// The gradient of a slot, with G that of the mixture, w = S - v, c = 1 / (rms(v) rms(w)), D = c (da Q^T) P^T, and the
// pulls of both norms, alpha v and beta w, follows arXiv 2505.23184, eq. 38-39:
//   dg = <v, R^T G>,  da = g v x (R^T G) in every plane,  dS = D v + beta w,  dv = g R^T G + D w + alpha v - dS.

#include <omp.h>

#include "rotation.h"

namespace {

// The tokens of one thread, from first to last.
struct Share {
    std::int64_t first, last;

    explicit Share(std::int64_t tokens)
        : first(tokens * omp_get_thread_num() / omp_get_num_threads()),
          last(tokens * (omp_get_thread_num() + 1) / omp_get_num_threads()) {}
};

template <class real, class stored>
void mix(const Mixture<real, stored>& of, real* mixed, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Share share(of.tokens);
        Slots<real, stored>(of).mix(share.first, share.last, mixed);
    }
}

template <class real>
struct Gradients {
    real *total, *latents, *weights;
    Rows<real> P, Q;
};

// The gradients of a few slots; adds to those of S, P and Q.
template <class real, class stored>
struct SlotGradients {
    Slots<real, stored> slots;
    Block<real> back, of_angles, of_v, D;
    std::vector<real> of_z, of_raw, weighted_z;
    real pull[SLOTS];

    explicit SlotGradients(const Mixture<real, stored>& of)
        : slots(of),
          back(SLOTS, of.out),
          of_angles(SLOTS, of.planes()),
          of_v(1, of.out),
          D(SLOTS, of.out),
          of_z(SLOTS * of.turns),
          of_raw(SLOTS * of.turns),
          weighted_z(SLOTS * of.turns) {}

    // R^T G into `back`, the angles' gradient without the weight, and the weight's.
    real turn_back(int n, const real* grad) {
        const real *v = slots.v[n], *cosine = slots.cosine[n], *sine = slots.sine[n];
        real *back_ = back[n], *of_angles_ = of_angles[n], of_weight = 0;
        const std::int64_t out = slots.of.out, planes = slots.of.planes();
#pragma omp simd reduction(+ : of_weight)
        for (std::int64_t i = 0; i < planes; ++i) {
            const real even = grad[2 * i] * cosine[i] + grad[2 * i + 1] * sine[i];
            const real odd = grad[2 * i + 1] * cosine[i] - grad[2 * i] * sine[i];
            of_angles_[i] = v[2 * i] * odd - v[2 * i + 1] * even;
            of_weight += v[2 * i] * even + v[2 * i + 1] * odd;
            back_[2 * i] = even;
            back_[2 * i + 1] = odd;
        }
        if (out % 2) {
            back_[out - 1] = grad[out - 1];
            of_weight += v[out - 1] * back_[out - 1];
        }
        return of_weight;
    }

    // Gradients of z and of what the norms scale, and the pull on both norms.
    void through_norms(int n, real weight) {
        const auto& of = slots.of;
        const real scale = slots.inverse_v[n] * slots.inverse_others[n];
        pull[n] = 0;
        for (std::int64_t i = n * of.turns; i < (n + 1) * of.turns; ++i) {
            of_z[i] *= weight;
            of_raw[i] = of_z[i] * scale;
            weighted_z[i] = slots.z[i] * weight;
            if (of.is_normed) pull[n] -= of_z[i] * slots.raw[i] / of.out;
        }
    }

    // From D and the pulls to the gradients of S and of the latents.
    void to_outputs(int n, std::int64_t place, real* of_total, real* of_latents) {
        const auto& of = slots.of;
        const real *v = slots.v[n], *others = slots.others[n], *back_ = back[n], *D_ = D[n];
        const real weight = of.weights[place], inverse_v = slots.inverse_v[n], inverse_others = slots.inverse_others[n];
        const real alpha = pull[n] * inverse_others * inverse_v * inverse_v * inverse_v;
        const real beta = pull[n] * inverse_v * inverse_others * inverse_others * inverse_others;
        real* of_v_ = of_v[0];
#pragma omp simd
        for (std::int64_t i = 0; i < of.out; ++i) {
            const real of_S = D_[i] * v[i] + beta * others[i];
            of_total[i] += of_S;
            of_v_[i] = weight * back_[i] + D_[i] * others[i] + alpha * v[i] - of_S;
        }
        dots<1, 8, stored, real>(of.rows(place), of.rank, of_v.rows(), of_latents, of.out);
    }

    template <int N>
    void add(std::int64_t place, const real* grad, const Gradients<real>& sums) {
        const auto& of = slots.of;
        slots.template make<N>(place);
        for (int n = 0; n < N; ++n) sums.weights[place + n] = turn_back(n, grad + of.token_of(place + n) * of.out);
        dots<N, 8 / N, real, real>(of.rows_of_Q(), of.turns, of_angles.rows(), of_z.data(), of.planes());
        for (int n = 0; n < N; ++n) through_norms(n, of.weights[place + n]);
        add_outer<N, 8 / N, real>(sums.Q, of.turns, weighted_z.data(), of_angles.rows(), of.planes());
        add_outer<N, 8 / N, real>(sums.P, of.turns, of_raw.data(), slots.product.rows(), of.out);
        D.clear(N);
        add_rows<N>(of.rows_of_P(), of.turns, of_raw.data(), D.rows(), of.out);
        for (int n = 0; n < N; ++n)
            to_outputs(n, place + n, sums.total + of.token_of(place + n) * of.out,
                       sums.latents + (place + n) * of.rank);
    }
};

// The sum of every thread's block, row by row.
template <class real>
void add_up(const std::vector<Block<real>>& blocks, std::int64_t count, std::int64_t width, real* result) {
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < count; ++row) {
        std::fill_n(result + row * width, width, real(0));
        for (const Block<real>& block : blocks)
            for (std::int64_t i = 0; i < width; ++i) result[row * width + i] += block[row][i];
    }
}

template <class real, class stored>
void add_gradients(const Mixture<real, stored>& of, const real* grad, const Gradients<real>& result, int threads) {
    // Every thread has sums of its own, added up in their order: the same numbers in every run with as many threads.
    threads = static_cast<int>(std::clamp<std::int64_t>(of.tokens, 1, threads));
    std::vector<Block<real>> of_P(threads, Block<real>(of.turns, of.out));
    std::vector<Block<real>> of_Q(threads, Block<real>(of.turns, of.planes()));
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
        const Gradients<real> sums{result.total, result.latents, result.weights, of_P[thread].rows(),
                                   of_Q[thread].rows()};
        SlotGradients<real, stored> slots(of);
        const Share share(of.tokens);
        std::fill(result.total + share.first * of.out, result.total + share.last * of.out, real(0));
        in_blocks(share.first * of.kept, share.last * of.kept, [&](std::int64_t place, auto count) {
            slots.template add<decltype(count)::value>(place, grad, sums);
        });
#pragma omp barrier
        add_up(of_P, of.turns, of.out, result.P.first);
        add_up(of_Q, of.turns, of.planes(), result.Q.first);
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
            add_rows<1>(Rows<const stored>{matrix + indices[place] * rank * width, width}, rank, factors + place * rank,
                        Rows<real>{row, width}, width);
    }
}

// result[token] = the token times each row of its kept experts.
template <class real, class stored>
void gathered_dots(std::int64_t tokens, std::int64_t kept, std::int64_t rank, std::int64_t width, const real* wide,
                   const std::int64_t* indices, const stored* matrix, real* result, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t place = 0; place < tokens * kept; ++place)
        dots<1>(Rows<const stored>{matrix + indices[place] * rank * width, width}, rank,
                Rows<const real>{wide + place / kept * width, width}, result + place * rank, width);
}

}  // namespace

#define GATHERED(name, real, stored)                                                                           \
    extern "C" void gathered_sums_##name(std::int64_t tokens, std::int64_t kept, std::int64_t rank,            \
                                         std::int64_t width, const real* factors, const std::int64_t* indices, \
                                         const stored* matrix, real* result, int threads) {                    \
        gathered_sums(tokens, kept, rank, width, factors, indices, matrix, result, threads);                   \
    }                                                                                                          \
    extern "C" void gathered_dots_##name(std::int64_t tokens, std::int64_t kept, std::int64_t rank,            \
                                         std::int64_t width, const real* wide, const std::int64_t* indices,    \
                                         const stored* matrix, real* result, int threads) {                    \
        gathered_dots(tokens, kept, rank, width, wide, indices, matrix, result, threads);                      \
    }

#define TURNED_SUM(name, real, stored)                                                                                \
    extern "C" void turned_sum_##name(std::int64_t tokens, std::int64_t kept, std::int64_t rank, std::int64_t out,    \
                                      std::int64_t turns, bool is_normed, double eps, const real* total,              \
                                      const real* latents, const real* weights, const std::int64_t* indices,          \
                                      const stored* B, const real* P, const real* Q, real* mixed, int threads) {      \
        const Mixture<real, stored> of{tokens, kept, rank, out, turns, is_normed, static_cast<real>(eps), 0,          \
            total, latents, weights, indices, B, P, Q};                                                               \
        mix(of, mixed, threads);                                                                                      \
    }                                                                                                                 \
    extern "C" void turned_sum_gradients_##name(                                                                      \
        std::int64_t tokens, std::int64_t kept, std::int64_t rank, std::int64_t out, std::int64_t turns,              \
        bool is_normed, double eps, const real* total, const real* latents, const real* weights,                      \
        const std::int64_t* indices, const stored* B, const real* P, const real* Q, const real* grad, real* of_total, \
        real* of_latents, real* of_weights, real* of_P, real* of_Q, int threads) {                                    \
        const Mixture<real, stored> of{tokens, kept, rank, out, turns, is_normed, static_cast<real>(eps), 0,          \
            total, latents, weights, indices, B, P, Q};                                                               \
        add_gradients(of, grad, Gradients<real>{of_total, of_latents, of_weights, {of_P, out}, {of_Q, out / 2}},      \
                      threads);                                                                                       \
    }

GATHERED(float32, float, float)
GATHERED(bfloat16, float, bfloat16)
GATHERED(float64, double, double)
TURNED_SUM(float32, float, float)
TURNED_SUM(bfloat16, float, bfloat16)
TURNED_SUM(float64, double, double)
