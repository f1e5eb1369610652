// As many numbers as the processor takes at once, from rows as they are stored.

#pragma once

#include <cstdint>
#include <cstring>

#if defined __AVX2__
#include <immintrin.h>
#endif

#if defined __AVX512F__
constexpr std::int64_t BYTES = 64;
#elif defined __AVX2__
constexpr std::int64_t BYTES = 32;
#else
constexpr std::int64_t BYTES = 16;
#endif

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

template <class real>
struct Lanes {
    typedef real type __attribute__((vector_size(BYTES)));
    static constexpr std::int64_t count = BYTES / sizeof(real);
};

// What 16-bit numbers become; named by compilers that look at every `load` before they choose one.
template <>
struct Lanes<bfloat16> : Lanes<float> {};

template <class real>
typename Lanes<real>::type load(const real* from) {
    typename Lanes<real>::type lanes;
    std::memcpy(&lanes, from, BYTES);
    return lanes;
}

inline Lanes<float>::type load(const bfloat16* from) {
    typedef std::uint32_t wide __attribute__((vector_size(BYTES)));
#if defined __AVX512F__
    const wide bits = (wide)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined __AVX2__
    const wide bits = (wide)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    wide bits;
    for (std::int64_t i = 0; i < Lanes<float>::count; ++i) bits[i] = from[i].bits;
#endif
    return (Lanes<float>::type)(bits << 16);
}

template <class real>
void store(real* to, typename Lanes<real>::type lanes) {
    std::memcpy(to, &lanes, BYTES);
}
