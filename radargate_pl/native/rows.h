// Rows of numbers, those of others and blocks of one's own.

#pragma once

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

// Rows of numbers, each `stride` numbers after the last.
template <class T>
struct Rows {
    T* first;
    std::int64_t stride;

    T* operator[](std::int64_t row) const { return first + row * stride; }
    Rows from(std::int64_t row) const { return {first + row * stride, stride}; }
    operator Rows<const T>() const { return {first, stride}; }
};

constexpr std::int64_t LINE = 64;  // of the cache, in bytes

template <class T>
struct AtLines {
    using value_type = T;

    AtLines() = default;
    template <class U>
    AtLines(const AtLines<U>&) {}
    T* allocate(std::size_t count) {
        return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(LINE)));
    }
    void deallocate(T* place, std::size_t) { ::operator delete(place, std::align_val_t(LINE)); }
    bool operator==(const AtLines&) const { return true; }
    bool operator!=(const AtLines&) const { return false; }
};

// Rows of zeros of its own. Each begins at a line: vectors that cross one take four times as long.
template <class T>
struct Block {
    std::int64_t stride;
    std::vector<T, AtLines<T>> numbers;

    Block(std::int64_t count, std::int64_t width)
        : stride((width * sizeof(T) + LINE - 1) / LINE * LINE / sizeof(T)), numbers(count * stride) {}

    T* operator[](std::int64_t row) { return numbers.data() + row * stride; }
    const T* operator[](std::int64_t row) const { return numbers.data() + row * stride; }
    Rows<T> rows() { return {numbers.data(), stride}; }
    void clear(std::int64_t count) { std::fill_n(numbers.data(), count * stride, T(0)); }
};
