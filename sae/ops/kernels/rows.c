// Rows of float32: sums of weighted ones, products with them, and where their largest numbers are.
//
// What `on_cpu.py` beside this file calls. Every number is made by one thread in one order, so results do not
// depend on how many threads there are. Plain C with GCC's vectors: any processor, whatever width it has.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#define LANES 16
#define REGISTERS 8  // vectors of sums that are held at a time

typedef float Lanes __attribute__((vector_size(4 * LANES)));

static inline Lanes load(const float *from) {
    Lanes lanes;
    memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

static inline void store(float *to, Lanes lanes) { memcpy(to, &lanes, sizeof lanes); }

static inline float sum_of(Lanes lanes) {
    float some[LANES];
    store(some, lanes);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) some[i] += some[i + half];
    return some[0];
}

static inline int out_of_range(const int64_t *indices, int64_t begin, int64_t end, int64_t n) {
    int found = 0;
    for (int64_t e = begin; e < end; e++) found |= (uint64_t)indices[e] >= (uint64_t)n;
    return found;
}

// out[bag] = sum over its entries of weights[e] * matrix[indices[e]].
// Returns 0, or 1 if an index is not one of the matrix's n rows.
int sum_rows(int64_t n_bags, int64_t n, int64_t width, const int64_t *offsets, const int64_t *indices,
             const float *weights, const float *matrix, float *out, int threads) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads) reduction(| : failed)
    for (int64_t bag = 0; bag < n_bags; bag++) {
        const int64_t begin = offsets[bag], end = offsets[bag + 1];
        if (out_of_range(indices, begin, end, n)) {
            failed = 1;
            continue;
        }
        float *sums = out + bag * width;
        int64_t column = 0;
        for (; column + REGISTERS * LANES <= width; column += REGISTERS * LANES) {
            Lanes total[REGISTERS] = {{0}};
            for (int64_t e = begin; e < end; e++) {
                const float *row = matrix + indices[e] * width + column;
                for (int r = 0; r < REGISTERS; r++) total[r] += weights[e] * load(row + r * LANES);
            }
            for (int r = 0; r < REGISTERS; r++) store(sums + column + r * LANES, total[r]);
        }
        for (; column + LANES <= width; column += LANES) {
            Lanes total = {0};
            for (int64_t e = begin; e < end; e++) total += weights[e] * load(matrix + indices[e] * width + column);
            store(sums + column, total);
        }
        for (; column < width; column++) {
            float total = 0;
            for (int64_t e = begin; e < end; e++) total += weights[e] * matrix[indices[e] * width + column];
            sums[column] = total;
        }
    }
    return failed;
}

// out[e] = left[row of e] . right[indices[e]]. Returns 0, or 1 if an index is not one of right's n rows.
int products(int64_t n_rows, int64_t n, int64_t width, const int64_t *offsets, const int64_t *indices,
             const float *left, const float *right, float *out, int threads) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads) reduction(| : failed)
    for (int64_t row = 0; row < n_rows; row++) {
        if (out_of_range(indices, offsets[row], offsets[row + 1], n)) {
            failed = 1;
            continue;
        }
        const float *a = left + row * width;
        for (int64_t e = offsets[row]; e < offsets[row + 1]; e++) {
            const float *b = right + indices[e] * width;
            Lanes some[4] = {{0}};
            int64_t column = 0;
            for (; column + 4 * LANES <= width; column += 4 * LANES)
                for (int r = 0; r < 4; r++)
                    some[r] += load(a + column + r * LANES) * load(b + column + r * LANES);
            for (; column + LANES <= width; column += LANES) some[0] += load(a + column) * load(b + column);
            float total = sum_of((some[0] + some[1]) + (some[2] + some[3]));
            for (; column < width; column++) total += a[column] * b[column];
            out[e] = total;
        }
    }
    return failed;
}

// Numbers as integers of the same order, NaN above all; and back.
static inline int32_t key_of(float number) {
    int32_t bits;
    memcpy(&bits, &number, sizeof bits);
    bits ^= (bits >> 31) & INT32_MAX;
    return number != number ? INT32_MAX : bits;
}

static inline float number_of(int32_t key) {
    float number;
    key ^= (key >> 31) & INT32_MAX;
    memcpy(&number, &key, sizeof number);
    return number;
}

static inline int64_t at_least(const int32_t *keys, int64_t n, int32_t level) {
    int32_t found = 0;
    for (int64_t i = 0; i < n; i++) found += keys[i] >= level;
    return found;
}

// A level that at least k keys reach, and no more than `enough` if there is such a one, by bisection between
// `low`, which at least k reach, and the highest level of all; `guess` is tried first.
static int32_t level_for(const int32_t *keys, int64_t n, int64_t k, int64_t enough, int32_t low, int32_t guess) {
    int64_t found = n, high = INT32_MAX;
    int32_t level = guess > low ? guess : low;
    while (found > enough && low < high) {
        const int64_t now = at_least(keys, n, level);
        if (now >= k) {
            low = level;
            found = now;
        } else {
            high = (int64_t)level - 1;
        }
        level = (int32_t)(low + (high - low + 1) / 2);
    }
    return low;
}

// The largest of every group, keys, and columns that may be chosen.
typedef struct {
    float *tops;
    int32_t *keys, *columns;
} Scratch;

// The largest of each group of columns, every n_groups-th column being of the same; NaN is passed over.
static void tops_of(const float *row, int64_t width, int64_t n_groups, float *tops) {
    for (int64_t g = 0; g < n_groups; g++) tops[g] = -INFINITY;
    for (int64_t first = 0; first < width; first += n_groups) {
        const int64_t some = width - first < n_groups ? width - first : n_groups;
        for (int64_t g = 0; g < some; g++) tops[g] = row[first + g] > tops[g] ? row[first + g] : tops[g];
    }
}

// Which of LANES numbers are not below a level, a bit for each; NaN is not.
static inline uint32_t not_below(const float *numbers, float level) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(numbers), _mm512_set1_ps(level), _CMP_NLT_UQ);
#elif defined(__AVX__)
    const __m256 all = _mm256_set1_ps(level);
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(numbers), all, _CMP_NLT_UQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(numbers + 8), all, _CMP_NLT_UQ));
    return (uint32_t)low | (uint32_t)high << 8;
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (uint32_t) !(numbers[i] < level) << i;
    return bits;
#endif
}

// Of one row. Each of the k largest reaches the level that k groups' largest reach, as few others do. Columns ascend.
static void largest_of(const float *row, int64_t width, int64_t k, int64_t n_groups, int32_t *guess, Scratch some,
                       float *values, int64_t *columns) {
    tops_of(row, width, n_groups, some.tops);
    for (int64_t g = 0; g < n_groups; g++) some.keys[g] = key_of(some.tops[g]);
    const int32_t low = level_for(some.keys, n_groups, k, k + k / 4 + 2, INT32_MIN, *guess);
    const float least = number_of(low);
    *guess = low;
    int64_t found = 0, column = 0;
    for (; column + LANES <= width; column += LANES)
        for (uint32_t bits = not_below(row + column, least); bits; bits &= bits - 1)
            some.columns[found++] = (int32_t)column + __builtin_ctz(bits);
    for (; column < width; column++)
        if (!(row[column] < least)) some.columns[found++] = (int32_t)column;
    for (int64_t i = 0; i < found; i++) some.keys[i] = key_of(row[some.columns[i]]);
    const int32_t level = level_for(some.keys, found, k, k, INT32_MIN, low);
    int64_t ties = k;  // as many of those at the level as those above leave
    for (int64_t i = 0; i < found; i++) ties -= some.keys[i] > level;
    for (int64_t i = 0, n = 0; n < k; i++) {
        if (some.keys[i] < level || (some.keys[i] == level && ties-- <= 0)) continue;
        columns[n] = some.columns[i];
        values[n++] = row[some.columns[i]];
    }
}

// The k largest numbers of every row and their columns, ascending; NaN is above all, 0 < k <= width < 2^31.
// Returns 0, or 1 without memory.
int largest(int64_t n_rows, int64_t width, int64_t k, const float *matrix, float *values, int64_t *columns,
            int threads) {
    int64_t group = 16;
    while (group > 1 && width / group < 4 * k) group /= 2;
    const int64_t n_groups = (width + group - 1) / group;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Scratch some = {malloc(sizeof(float) * n_groups), malloc(sizeof(int32_t) * width),
                        malloc(sizeof(int32_t) * width)};
        failed = !some.tops || !some.keys || !some.columns;
        int32_t guess = INT32_MIN;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_rows; r++)
            if (!failed)
                largest_of(matrix + r * width, width, k, n_groups, &guess, some, values + r * k, columns + r * k);
        free(some.tops), free(some.keys), free(some.columns);
    }
    return failed;
}

// Entries in the order of their latents, rows ascending in each: latent i owns order[offsets[i]:offsets[i + 1]].
// Returns 0, or 1 if a latent is out of range.
int by_latent(int64_t n_rows, int64_t n_latents, const int64_t *row_offsets, const int64_t *indices, int64_t *order,
              int64_t *rows, int64_t *offsets, int threads) {
    (void)threads;  // two passes over the entries: one thread is done before others have begun
    const int64_t n_entries = row_offsets[n_rows];
    memset(offsets, 0, sizeof(int64_t) * (n_latents + 1));
    for (int64_t e = 0; e < n_entries; e++) {
        if (indices[e] < 0 || indices[e] >= n_latents) return 1;
        offsets[indices[e] + 1]++;
    }
    for (int64_t i = 0; i < n_latents; i++) offsets[i + 1] += offsets[i];
    for (int64_t row = 0; row < n_rows; row++)
        for (int64_t e = row_offsets[row]; e < row_offsets[row + 1]; e++) {
            const int64_t place = offsets[indices[e]]++;
            order[place] = e;
            rows[place] = row;
        }
    memmove(offsets + 1, offsets, sizeof(int64_t) * n_latents);
    offsets[0] = 0;
    return 0;
}

// Adam's step on the rows whose gradient is not all zeros: of the weights and of both moments, in place. `lr` is over
// the first moment's bias, `root` one over the root of the second's; a rate is one less its beta.
int adam_rows(int64_t n_rows, int64_t width, float *weights, const float *gradient, float *first, float *second,
              float lr, float root, float beta1, float rate1, float beta2, float rate2, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n_rows; row++) {
        float *w = weights + row * width, *m = first + row * width, *v = second + row * width;
        const float *g = gradient + row * width;
        int32_t part = 0;
        for (int64_t i = 0; i < width; i++) part |= g[i] != 0;
        if (!part) continue;
        for (int64_t i = 0; i < width; i++) {
            m[i] = beta1 * m[i] + rate1 * g[i];
            v[i] = beta2 * v[i] + rate2 * g[i] * g[i];
            w[i] -= lr * m[i] / (sqrtf(v[i]) * root + eps);
        }
    }
    return 0;
}
