/* lookup.h one element after the other; included by it alone. */
#ifndef SSDTUNE_LOOKUP_PLAIN_H
#define SSDTUNE_LOOKUP_PLAIN_H

enum { BYTES = 8, LOOKUP_BITS = 0, CAN_STREAM = 0 };
typedef uint64_t bytes;
typedef struct { float values[16]; } entries;
typedef struct { uint16_t values[16]; } lookup;
typedef entries floats16;
typedef struct { float scale, less; } line;

INLINE bytes get(const uint8_t *from)
{
    bytes a;
    memcpy(&a, from, sizeof a);
    return a;
}
INLINE void keep(uint8_t *to, bytes a) { memcpy(to, &a, sizeof a); }
INLINE bytes none(void) { return 0; }
INLINE bytes right(bytes a, int n) { return a >> n; }
INLINE bytes left(bytes a, int n) { return a << n; }
INLINE bytes with(bytes a, bytes b, int mask) { return a | (b & (0x0101010101010101u * (bytes)mask)); }

INLINE bytes mapped(bytes a, const uint8_t table[16])
{
    bytes to = 0;
    for (int i = 0; i < 64; i += 8)
        to |= (bytes)table[a >> i & 15] << i;
    return to;
}

INLINE entries spread(const float *values)
{
    entries of;
    memcpy(&of, values, sizeof of);
    return of;
}

INLINE void make_two(lookup to[2], entries of, float zero, float scale, float next_zero, float next_scale)
{
    for (int i = 0; i < 16; i++) {
        to[0].values[i] = nearest((of.values[i] - zero) * scale, 0);
        to[1].values[i] = nearest((of.values[i] - next_zero) * next_scale, 0);
    }
}

INLINE lookup of_words(const uint16_t *words)
{
    lookup in;
    memcpy(&in, words, sizeof in);
    return in;
}

INLINE void look_up(uint16_t *to, const uint8_t *codes, const lookup in[2], int is_streamed)
{
    for (int i = 0; i < STEP; i++) {
        to[i] = in[0].values[codes[i] & 15];
        to[LANES + i] = in[1].values[codes[i] >> 4];
    }
}

INLINE void look_up_nibbles(uint16_t *to, const uint8_t *codes, lookup in, int step, int is_high_first, int is_streamed)
{
    for (int i = 0; i < step; i += 2) {
        to[i + is_high_first] = in.values[codes[i / 2] & 15];
        to[i + !is_high_first] = in.values[codes[i / 2] >> 4];
    }
}

INLINE void compute_words(uint16_t *to, const uint8_t *codes, float zero, float scale, int is_streamed)
{
    for (int i = 0; i < STEP; i++)
        to[i] = nearest(((float)codes[i] - zero) * scale, 0);
}

INLINE int rounds_at_once(void) { return 0; }
INLINE line line_of(float scale, float less) { return (line){scale, less}; }

INLINE void compute_fused(uint16_t *to, const uint8_t *codes, line on, int at_once, int is_streamed)
{
    for (int i = 0; i < STEP; i++)
        to[i] = nearest((float)codes[i] * on.scale - on.less, 0);
}

INLINE void compute_floats(float *to, const uint8_t *codes, float zero, float scale, int is_streamed)
{
    for (int i = 0; i < STEP; i++)
        to[i] = ((float)codes[i] - zero) * scale;
}

INLINE floats16 get_floats(const float *from) { return spread(from); }

INLINE floats16 times(floats16 a, float scale)
{
    for (int i = 0; i < 16; i++)
        a.values[i] *= scale;
    return a;
}

INLINE void look_up_floats(float *to, const uint8_t *codes, floats16 in, int is_high_first, int is_streamed)
{
    for (int i = 0; i < HALF_STEP; i += 2) {
        to[i + is_high_first] = in.values[codes[i / 2] & 15];
        to[i + !is_high_first] = in.values[codes[i / 2] >> 4];
    }
}

#endif
