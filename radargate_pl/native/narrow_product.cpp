// A product of 16-bit matrices summed in float32: the sum of all experts' outputs, S = s h B, without widening either.
// narrow_product.py states the shapes. Processors without such an instruction have torch's product of widened matrices.

#include <omp.h>

#include "narrow_tiles.h"

#if defined __AVX512BF16__

namespace {

void multiply(std::int64_t tokens, std::int64_t depth, std::int64_t width, float scale, const bfloat16* x,
              const bfloat16* rows, float* result, int threads) {
    const std::int64_t panels = (width + PANEL - 1) / PANEL;
    Block<bfloat16> packed(panels, depth * PANEL);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (std::int64_t panel = 0; panel < panels; ++panel)
            pack(rows + panel * PANEL, depth, width, std::min(PANEL, width - panel * PANEL), packed[panel]);
        // Every thread takes some tokens: a panel is read from the nearest cache for all of them.
        const std::int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        const std::int64_t first = tokens * thread / count, last = tokens * (thread + 1) / count;
        for (std::int64_t panel = 0; panel < panels; ++panel) {
            const std::int64_t start = panel * PANEL, columns = std::min(PANEL, width - start);
            float* to = result + start;
            std::int64_t token = first;
            for (; token + TOKENS <= last; token += TOKENS)
                tile<TOKENS>(x + token * depth, depth, packed[panel], scale, to + token * width, width, columns);
            for (; token < last; ++token)
                tile<1>(x + token * depth, depth, packed[panel], scale, to + token * width, width, columns);
        }
    }
}

}  // namespace

extern "C" void narrow_product_bfloat16(std::int64_t tokens, std::int64_t depth, std::int64_t width, float scale,
                                        const bfloat16* x, const bfloat16* rows, float* result, int threads) {
    multiply(tokens, depth, width, scale, x, rows, result, threads);
}

#endif
