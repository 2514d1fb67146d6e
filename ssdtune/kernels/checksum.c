/* The fast twin of checksum.py, which defines every bit of it. */
#include <stdint.h>
#include <string.h>

#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)

enum { LANES = 64, TOGETHER = 4 };

/* sums: LANES words, updated with `rows` rows of LANES words each. factors: the multiplier to the powers 1 ... TOGETHER.
 *
 * TOGETHER rows at a time: their products do not wait for each other. */
void NAME(ssdtune_checksum, SUFFIX)(
    uint32_t *sums, const uint8_t *memory, int64_t rows, const uint32_t *factors)
{
    uint32_t kept[LANES], words[TOGETHER][LANES];
    memcpy(kept, sums, sizeof kept);
    int64_t row = 0;
    for (; row + TOGETHER <= rows; row += TOGETHER) {
        memcpy(words, memory + row * (int64_t)sizeof kept, sizeof words);
        for (int l = 0; l < LANES; l++)
            kept[l] = kept[l] * factors[3] + words[0][l] * factors[2] + words[1][l] * factors[1]
                + words[2][l] * factors[0] + words[3][l];
    }
    for (; row < rows; row++) {
        memcpy(words[0], memory + row * (int64_t)sizeof kept, sizeof words[0]);
        for (int l = 0; l < LANES; l++)
            kept[l] = kept[l] * factors[0] + words[0][l];
    }
    memcpy(sums, kept, sizeof kept);
}
