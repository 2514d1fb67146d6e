/* The fast twin of checksum.py, which defines it: all but the end, where lanes become one number.
 *
 * Compiled once for each instruction set, with the names' ending in SUFFIX. */
#include "native.h"

enum { LANES = 64, ROW = 4 * LANES, BLOCK = 64 * ROW }; /* words; bytes; bytes */
enum { WIDE = WIDE_WORDS };
typedef uint32_t wide __attribute__((vector_size(4 * WIDE)));
enum { PER_ROW = LANES / WIDE };

struct checksum {
    const uint8_t *from; /* at any address */
    int64_t num_bytes;
    uint32_t total[LANES];
};

static inline wide mix(wide lane, wide word)
{
    const wide product = (lane ^ word) * 0x9E3779B1u;
    return product ^ (product >> 15);
}

static void start(wide lanes[PER_ROW])
{
    uint32_t numbers[LANES];
    for (uint32_t l = 0; l < LANES; l++)
        numbers[l] = l + 1;
    memcpy(lanes, numbers, sizeof numbers);
}

static void add_rows(wide to[PER_ROW], const uint8_t *from, int64_t num_rows)
{
    wide lanes[PER_ROW];
    memcpy(lanes, to, sizeof lanes);
    for (int64_t row = 0; row < num_rows; row++, from += ROW)
#pragma GCC unroll 16
        for (int i = 0; i < PER_ROW; i++) {
            wide words;
            memcpy(&words, from + i * (int)sizeof words, sizeof words);
            lanes[i] = mix(lanes[i], words);
        }
    memcpy(to, lanes, sizeof lanes);
}

void NAME(ssdtune_checksum, SUFFIX)(struct checksum *job)
{
    wide total[PER_ROW], lanes[PER_ROW];
    start(total);
    for (int64_t at = 0; at < job->num_bytes; at += BLOCK) {
        const int64_t here = job->num_bytes - at < BLOCK ? job->num_bytes - at : BLOCK;
        start(lanes);
        add_rows(lanes, job->from + at, here / ROW);
        if (here % ROW) {
            uint8_t last[ROW] = {0};
            memcpy(last, job->from + at + here / ROW * ROW, (size_t)(here % ROW));
            add_rows(lanes, last, 1);
        }
        add_rows(total, (const uint8_t *)lanes, 1);
    }
    memcpy(job->total, total, sizeof total);
}
