// Products of a few vectors with rows that lie one after the other.

#pragma once

#include <cstdint>

#include "lanes.h"
#include "rows.h"

// R rows times each of N vectors: result[n * stride + r].
template <int R, int N, class stored, class real>
void tile_of_dots(Rows<const stored> rows, Rows<const real> x, real* result, std::int64_t stride, std::int64_t width) {
    typename Lanes<real>::type sums[N][R] = {}, row[R];
    std::int64_t i = 0;
    for (; i + Lanes<real>::count <= width; i += Lanes<real>::count) {
        for (int r = 0; r < R; ++r) row[r] = load(rows[r] + i);
        for (int n = 0; n < N; ++n) {
            const auto vector = load(x[n] + i);
            for (int r = 0; r < R; ++r) sums[n][r] += row[r] * vector;
        }
    }
    for (int n = 0; n < N; ++n)
        for (int r = 0; r < R; ++r) {
            real sum = 0;
            for (std::int64_t lane = 0; lane < Lanes<real>::count; ++lane) sum += sums[n][r][lane];
            for (std::int64_t last = i; last < width; ++last) sum += widened(rows[r][last]) * x[n][last];
            result[n * stride + r] = sum;
        }
}

// targets[t] += sum over S of factors[t * of_target + s * of_source] * sources[s].
template <int T, int S, class stored, class real>
void tile_of_sums(Rows<const stored> sources, const real* factors, std::int64_t of_target, std::int64_t of_source,
                  Rows<real> targets, std::int64_t width) {
    real factor[T][S];
    for (int t = 0; t < T; ++t)
        for (int s = 0; s < S; ++s) factor[t][s] = factors[t * of_target + s * of_source];
    typename Lanes<real>::type source[S];
    std::int64_t i = 0;
    for (; i + Lanes<real>::count <= width; i += Lanes<real>::count) {
        for (int s = 0; s < S; ++s) source[s] = load(sources[s] + i);
        for (int t = 0; t < T; ++t) {
            auto target = load(targets[t] + i);
            for (int s = 0; s < S; ++s) target += factor[t][s] * source[s];
            store(targets[t] + i, target);
        }
    }
    for (; i < width; ++i)
        for (int t = 0; t < T; ++t)
            for (int s = 0; s < S; ++s) targets[t][i] += factor[t][s] * widened(sources[s][i]);
}

// Each of `count` rows times each of N vectors: result[n * count + row]. Eight at a time: one waits for itself.
template <int N, int R = 8 / N, class stored, class real>
void dots(Rows<const stored> rows, std::int64_t count, Rows<const real> x, real* result, std::int64_t width,
          std::int64_t first = 0) {
    for (; first + R <= count; first += R) tile_of_dots<R, N>(rows.from(first), x, result + first, count, width);
    if constexpr (R > 1) dots<N, R / 2>(rows, count, x, result, width, first);
}

// Each of N results += sum of `count` rows times its factors[n * count + row].
template <int N, int R = 8 / N, class stored, class real>
void add_rows(Rows<const stored> rows, std::int64_t count, const real* factors, Rows<real> results, std::int64_t width,
              std::int64_t first = 0) {
    for (; first + R <= count; first += R)
        tile_of_sums<N, R>(rows.from(first), factors + first, count, 1, results, width);
    if constexpr (R > 1) add_rows<N, R / 2>(rows, count, factors, results, width, first);
}

// Each of `count` rows += sum of N vectors times their factors[n * count + row].
template <int N, int R = 8 / N, class real>
void add_outer(Rows<real> rows, std::int64_t count, const real* factors, Rows<const real> x, std::int64_t width,
               std::int64_t first = 0) {
    for (; first + R <= count; first += R) tile_of_sums<R, N>(x, factors + first, 1, count, rows.from(first), width);
    if constexpr (R > 1) add_outer<N, R / 2>(rows, count, factors, x, width, first);
}
