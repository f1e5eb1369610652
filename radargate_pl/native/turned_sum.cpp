// The mixture of rotated experts and its gradients, one token after the other: nothing as wide as a layer leaves the
// nearest cache between the rows of B and the result. turned_sum.py states the formulas and the shapes; the same in
// tensor operations is fast_rotation.py, and the readable form rotations.py. Tests hold all of them together.
//
// The gradient of a slot, with G that of the mixture, w = S - v, c = 1 / (rms(v) rms(w)), D = c (da Q^T) P^T, and the
// pulls of both norms, alpha v and beta w, follows arXiv 2505.23184, eq. 38-39:
//   dg = <v, R^T G>,  da = g v x (R^T G) in every plane,  dS = D v + beta w,  dv = g R^T G + D w + alpha v - dS.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

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

// result += sum of `count` rows times their factors.
template <class stored, class real>
void add_rows(const stored* rows, std::int64_t count, const real* factors, real* result, std::int64_t width) {
    std::int64_t row = 0;
    for (; row + 4 <= count; row += 4) {
        const stored *a = rows + row * width, *b = a + width, *c = b + width, *d = c + width;
        const real f = factors[row], g = factors[row + 1], h = factors[row + 2], k = factors[row + 3];
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i)
            result[i] += (f * widened(a[i]) + g * widened(b[i])) + (h * widened(c[i]) + k * widened(d[i]));
    }
    for (; row < count; ++row) {
        const stored* a = rows + row * width;
        const real f = factors[row];
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i) result[i] += f * widened(a[i]);
    }
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

template <class real, class stored>
struct Mixture {
    std::int64_t tokens, kept, rank, out, turns;
    bool is_normed;
    real eps;
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
    }
    for (int thread = 1; thread < threads; ++thread)
        for (std::int64_t i = 0; i < size; ++i) sums[i] += sums[thread * size + i];
    std::copy(sums.begin(), sums.begin() + size_P, result.P);
    std::copy(sums.begin() + size_P, sums.begin() + size, result.Q);
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
        const Mixture<real, stored> of{tokens, kept,    rank,    out, turns, is_normed, static_cast<real>(eps), total, \
                                       latents, weights, indices, B,   P,     Q};                                    \
        mix(of, mixed, threads);                                                                                     \
    }                                                                                                                \
    extern "C" void turned_sum_gradients_##name(                                                                     \
        std::int64_t tokens, std::int64_t kept, std::int64_t rank, std::int64_t out, std::int64_t turns,             \
        bool is_normed, double eps, const real* total, const real* latents, const real* weights,                     \
        const std::int64_t* indices, const stored* B, const real* P, const real* Q, const real* grad, real* of_total, \
        real* of_latents, real* of_weights, real* of_P, real* of_Q, int threads) {                                   \
        const Mixture<real, stored> of{tokens, kept,    rank,    out, turns, is_normed, static_cast<real>(eps), total, \
                                       latents, weights, indices, B,   P,     Q};                                    \
        add_gradients(of, grad, Gradients<real>{of_total, of_latents, of_weights, of_P, of_Q}, threads);             \
    }

GATHERED(float32, float, float)
GATHERED(bfloat16, float, bfloat16)
GATHERED(float64, double, double)
TURNED_SUM(float32, float, float)
TURNED_SUM(bfloat16, float, bfloat16)
TURNED_SUM(float64, double, double)
