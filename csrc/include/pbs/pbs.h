/* SPDX-License-Identifier: Apache-2.0
 *
 * pbs.h: the contract. Permuted block-sparse attention in four verbs,
 *
 *     score -> permute -> select -> attend        (and pbs_prefill: all four in one call)
 *
 * Plain C99; no torch, no CUDA types. The same structs serve every backend.
 *
 * Rules that hold for every entry point
 *  - The caller owns all memory. Nothing is allocated, printed or kept between calls; the only
 *    state is the thread-local detail of the last error (pbs_last_error).
 *  - Every argument is checked before any output is written: a call that fails leaves outputs
 *    untouched. On a device, where the host cannot read what pointers point to, kernels clamp it.
 *  - Params structs start with struct_size = sizeof(the struct). Fields are only ever appended, so
 *    an older caller keeps working; fields it does not know are taken as zero.
 *    Zero-initialise a struct, then name the fields you set (PBS_INIT does the first part).
 *  - Sizes are int32, offsets and strides int64. Strides count elements; the last dimension of
 *    q, k, v and out is contiguous.
 *  - Plain pointers (score, k_perm, bits, ...) are contiguous, in the order of the brackets.
 *
 * Letters: B batch (sequences), Hq / Hk query and key heads, Hp heads that own a permutation
 * (Hq for PBS_GQA_PER_HEAD, Hk for PBS_GQA_GROUP), Nq / Nk = max_seqlen_q / max_seqlen_k,
 * D head_dim, Tq / Tk = ceil(Nq / block_q), ceil(Nk / block_k), W = ceil(Tk / 32).
 */
#ifndef PBS_PBS_H
#define PBS_PBS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define PBS_API __attribute__((visibility("default")))
#else
#define PBS_API
#endif

#define PBS_ABI_VERSION 1
#define PBS_MAX_HEAD_DIM 256
#define PBS_MAX_SEGMENT_SIZE 2048

/* pbs_attend_params p = PBS_INIT(pbs_attend_params); */
#ifdef __cplusplus
#define PBS_INIT(type) (type{sizeof(type)})
#else
#define PBS_INIT(type) ((type){.struct_size = sizeof(type)})
#endif

/* ---- status ---------------------------------------------------------------------------------- */
typedef enum pbs_status {
    PBS_OK = 0,
    PBS_ERR_NULL = 1,        /* a required pointer is NULL */
    PBS_ERR_STRUCT_SIZE = 2, /* struct_size is smaller than any released struct */
    PBS_ERR_SHAPE = 3,       /* sizes do not agree or are out of range */
    PBS_ERR_DTYPE = 4,       /* unknown dtype, or dtypes that must be equal are not */
    PBS_ERR_STRIDE = 5,      /* last dimension not contiguous, or an output that overlaps itself */
    PBS_ERR_VALUE = 6,       /* an option outside what is allowed */
    PBS_ERR_WORKSPACE = 7,   /* workspace or packed buffer too small, or made by another call */
    PBS_ERR_UNSUPPORTED = 8, /* legal, but no kernel does it: take the dense route */
    PBS_ERR_DEVICE = 9       /* the GPU or its driver refused a launch */
} pbs_status;

PBS_API const char *pbs_status_name(pbs_status status);
/* One sentence about the last error of this thread: field, given value, what is allowed. */
PBS_API const char *pbs_last_error(void);

/* ---- tensors --------------------------------------------------------------------------------- */
typedef enum pbs_dtype { PBS_DTYPE_FP32 = 1, PBS_DTYPE_FP16 = 2, PBS_DTYPE_BF16 = 3 } pbs_dtype;

/* size = [batch, heads, seqlen, head_dim]; (B, H, N, D) and (B, N, H, D) differ in stride only.
 * A stride of 0 is allowed on inputs (expanded tensors, packed varlen: see pbs_geometry). */
typedef struct pbs_view {
    void *data;
    pbs_dtype dtype;
    int32_t size[4];
    int64_t stride[4];
} pbs_view;

/* Keys or values. block_table is room for paged caches and must be NULL today. */
typedef struct pbs_kv {
    pbs_view view;
    const int32_t *block_table;
    int64_t block_table_stride;
    int32_t page_size;
} pbs_kv;

/* Where each sequence lies in its row of q and k/v; NULL means "starts at 0, whole tensor". Left
 * and right padding, static caches, chunked prefill, prefix caches and packed varlen (a view whose
 * batch stride is 0 and one entry per sequence) are all this one thing.
 * Query row i of a sequence has absolute position i + kv_len - q_len (bottom-right alignment);
 * blocks are anchored at q_start, blocks and segments of keys at kv_start. Rows outside a sequence
 * are never read and never written. */
typedef struct pbs_geometry {
    const int32_t *q_start;  /* [B] or NULL */
    const int32_t *q_len;    /* [B] or NULL */
    const int32_t *kv_start; /* [B] or NULL */
    const int32_t *kv_len;   /* [B] or NULL */
    int32_t max_seqlen_q;    /* upper bound of q_len; 0 = q's seqlen */
    int32_t max_seqlen_k;    /* upper bound of kv_len; 0 = k's seqlen */
} pbs_geometry;

/* ---- where and how to run -------------------------------------------------------------------- */
typedef void (*pbs_task_fn)(int64_t begin, int64_t end, void *arg);
/* Calls task on disjoint ranges that cover [begin, end), on any threads; returns when all are done.
 * One thread may be given all of it (nested regions, a pool that is busy). */
typedef void (*pbs_parallel_for_fn)(void *pool, int64_t begin, int64_t end, pbs_task_fn task,
                                    void *arg);

typedef enum pbs_isa {
    PBS_ISA_AUTO = 0, /* environment PBS_ATTN_ISA if set, else the best for dtype and CPU */
    PBS_ISA_C = 1,    /* portable C11: the readable twin of every other path */
    PBS_ISA_AVX2 = 2,
    PBS_ISA_AVX512 = 3,
    PBS_ISA_AVX512_BF16 = 4,
    PBS_ISA_EMU_AVX2 = 5, /* the same kernels on an emulated vector unit: slow, for tests */
    PBS_ISA_EMU_AVX512 = 6,
    PBS_ISA_EMU_AVX512_BF16 = 7,
    PBS_ISA_SM80 = 8, /* CUDA, compute capability 8.0 and up */
    PBS_ISA_AMX = 9,  /* AMX-BF16 tiles beside AVX-512 */
    PBS_ISA_EMU_AMX = 10,
    PBS_ISA_SM90 = 11, /* CUDA, compute capability 9.0 */
    PBS_ISA_COUNT
} pbs_isa;

typedef struct pbs_exec {
    pbs_parallel_for_fn parallel_for; /* NULL = serial */
    void *pool;                       /* handed to parallel_for */
    int32_t num_threads;              /* tasks to cut work into, >= 1; 0 = 1. Never changes a bit */
    pbs_isa isa;
    void *stream;   /* cudaStream_t; NULL on CPU */
    int32_t device; /* CUDA ordinal; 0 on CPU */
} pbs_exec;

/* What one thread slot did in attend: for benchmarks. CPU only. */
typedef struct pbs_work_counters {
    uint64_t items;    /* query blocks of a head */
    uint64_t blocks;   /* key blocks computed, of the list and of the own span */
    uint64_t rescales; /* rows whose running maximum was raised after their first keys */
    uint64_t busy_ns;  /* time inside items */
} pbs_work_counters;

PBS_API const char *pbs_isa_name(pbs_isa isa);       /* "avx2"; NULL if there is none */
PBS_API pbs_isa pbs_isa_from_name(const char *name); /* PBS_ISA_COUNT if unknown */
PBS_API int pbs_isa_available(pbs_isa isa);          /* compiled in, and this CPU can run it */
PBS_API const char *pbs_isa_missing(pbs_isa isa);    /* why it is not; NULL if it is */
PBS_API pbs_isa pbs_isa_for(pbs_isa wanted, pbs_dtype dtype); /* what a call would run */

/* ---- options --------------------------------------------------------------------------------- */
typedef enum pbs_gqa { PBS_GQA_PER_HEAD = 0, PBS_GQA_GROUP = 1 } pbs_gqa;

typedef enum pbs_permute_mode {
    PBS_PERMUTE_NONE = 0,     /* MeanPooling: natural order, no segments, own span = own block */
    PBS_PERMUTE_IDENTITY = 1, /* the PBS rule on natural order: the control */
    PBS_PERMUTE_KEYS = 2,     /* the paper's method */
    PBS_PERMUTE_QUERIES = 3,
    PBS_PERMUTE_BOTH = 4
} pbs_permute_mode;

typedef enum pbs_order {
    PBS_ORDER_LAST_BLOCK = 0,   /* probe = last min(block_size, q_len) rows (the paper) */
    PBS_ORDER_MEAN_QUERY = 1,   /* probe = the mean of all query rows */
    PBS_ORDER_RANDOM_QUERY = 2, /* probe = one row drawn by seed and head */
    PBS_ORDER_RANDOM = 3        /* no probe: pseudo-random scores in [0, 1) by seed, head, key */
} pbs_order;

typedef enum pbs_select_method {
    PBS_SELECT_MEAN_POOL = 0,
    PBS_SELECT_ANTIDIAGONAL = 1
} pbs_select_method;

typedef enum pbs_reduce { PBS_REDUCE_SUM = 0, PBS_REDUCE_MAX = 1 } pbs_reduce;

typedef enum pbs_rule {
    PBS_RULE_PREFIX = 0,   /* smallest prefix of the descending order with mass >= tau */
    PBS_RULE_RELATIVE = 1, /* mass >= tau * the row's largest mass */
    PBS_RULE_ABSOLUTE = 2, /* mass >= tau */
    PBS_RULE_BUDGET = 3    /* the ceil(tau) largest */
} pbs_rule;

/* What the masses of ANTIDIAGONAL are shares of. Mode NONE always takes ROW. */
typedef enum pbs_normalize {
    PBS_NORMALIZE_HISTORY = 0, /* what lies before the own segments (the paper) */
    PBS_NORMALIZE_ROW = 1      /* all that a row group sees, its own segments included */
} pbs_normalize;

/* What attend does about blocks of history that are not listed. */
typedef enum pbs_correction {
    PBS_CORRECTION_NONE = 0,
    PBS_CORRECTION_MEAN = 1 /* one pseudo-token each: mean key and value, logit + ln(block_k) */
} pbs_correction;

/* Which keys a query block reads besides the listed ones; always from the original K/V with the
 * plain causal mask j <= p(i). */
typedef enum pbs_own {
    PBS_OWN_SEGMENT = 0, /* the segments that hold any position of the query block (PBS) */
    PBS_OWN_BLOCK = 1,   /* the key blocks that hold any position of it (natural-order methods) */
    PBS_OWN_MASK = 2,    /* nothing: bits alone decide, natural order, causal inside */
    PBS_OWN_NONE = 3,    /* nothing: listed blocks that lie wholly before the own segments (merge
                            with another call through lse) */
    PBS_OWN_ALL = 4      /* everything: dense causal attention; bits are not read */
} pbs_own;

/* ---- score: which keys matter (paper eq. 7) -------------------------------------------------- */
/* score[j] = mean over probe rows of softmax_j(softmax_scale * q_r . k_j) over the keys of the
 * complete segments, fp32, no causal mask inside the probe. GROUP averages the group's probe
 * queries first. 0 for every j beyond the complete segments. */
typedef struct pbs_score_params {
    size_t struct_size;
    pbs_view q; /* [B, Hq, Nq, D] */
    pbs_kv k;   /* [B, Hk, Nk, D] */
    pbs_geometry geometry;
    float softmax_scale; /* 0 = D^-0.5 */
    int32_t block_size;
    int32_t segment_size;
    pbs_gqa gqa;
    pbs_order order;
    uint64_t seed;
    float *score; /* [B, Hp, Nk] out */
    void *workspace;
    size_t workspace_bytes;
    pbs_exec exec;
} pbs_score_params;

PBS_API pbs_status pbs_score_workspace_size(const pbs_score_params *params, size_t *bytes);
PBS_API pbs_status pbs_score(const pbs_score_params *params);

/* ---- permute: bring them together (eq. 8) ---------------------------------------------------- */
/* Inside every complete segment, keys by descending score, ties by position; the tail keeps its
 * order. k_perm: permuted position -> original position, both relative to kv_start; identity from
 * the end of the complete segments to Nk. q_perm: permuted row -> original row, relative to
 * q_start: inside complete row segments, each key block's centroid in turn takes the block_size
 * most cosine-similar free rows (ties by row; rows stay ascending inside a block).
 * packed: K and V in the panel layout of one ISA, permuted (history) and original (own span). It
 * describes itself and fits only calls with the same shapes, geometry, dtype and ISA. */
typedef struct pbs_permute_params {
    size_t struct_size;
    pbs_view q; /* [B, Hq, Nq, D]; data NULL unless mode is QUERIES or BOTH (sizes always) */
    pbs_kv k;   /* [B, Hk, Nk, D] */
    pbs_kv v;   /* [B, Hk, Nk, D]; data may be NULL if packed and v_pool are NULL */
    const float *score;           /* [B, Hp, Nk]; NULL unless keys are permuted by score */
    const int32_t *k_perm_in;     /* [B, Hp, Nk] or NULL: a given order instead of score */
    const int32_t *permute_heads; /* [Hp] or NULL (all): 0 leaves that head in natural order */
    pbs_geometry geometry;
    int32_t block_size;
    int32_t segment_size;
    pbs_gqa gqa;
    pbs_permute_mode mode;
    int32_t *k_perm;   /* [B, Hp, Nk] out, or NULL */
    int32_t *q_perm;   /* [B, Hq, Nq] out; NULL unless mode is QUERIES or BOTH */
    float *k_pool;     /* [B, Hp, Tk, D] out, or NULL: fp32 means over the keys of each block */
    float *v_pool;     /* [B, Hp, Tk, D] out, or NULL */
    int32_t *pool_len; /* [B, Tk] out, or NULL: keys per block */
    void *packed;      /* out, 64-byte aligned, or NULL */
    size_t packed_bytes;
    void *workspace;
    size_t workspace_bytes;
    pbs_exec exec;
    pbs_correction correction; /* MEAN: packed holds block means as well, for such an attend */
} pbs_permute_params;

PBS_API pbs_status pbs_permute_workspace_size(const pbs_permute_params *params, size_t *bytes);
PBS_API pbs_status pbs_kv_packed_bytes(const pbs_permute_params *params, size_t *bytes);
PBS_API pbs_status pbs_permute(const pbs_permute_params *params);

/* ---- select: which key blocks each query block reads (Alg. 2) -------------------------------- */
/* A scorer fills strips of log masses, a rule turns a strip into bits, the forced blocks follow.
 * bits hold history only: bit n % 32 of word n / 32 is key block n; own-span bits are 0 (also for
 * PBS_PERMUTE_NONE, whose scorer includes the own blocks in the softmax and in the rule). */
typedef struct pbs_select_params {
    size_t struct_size;
    pbs_view q;             /* [B, Hq, Nq, D] */
    pbs_kv k;               /* [B, Hk, Nk, D]; data NULL allowed for MEAN_POOL */
    const float *k_pool;    /* [B, Hp, Tk, D]; NULL allowed for ANTIDIAGONAL */
    const int32_t *k_perm;  /* [B, Hp, Nk] or NULL = natural order */
    const int32_t *q_perm;  /* [B, Hq, Nq] or NULL */
    const float *tau_heads; /* [Hq] or NULL = tau for all */
    pbs_geometry geometry;
    float softmax_scale; /* 0 = D^-0.5 */
    int32_t block_size;
    int32_t segment_size;
    pbs_gqa gqa;
    pbs_permute_mode mode;
    pbs_select_method method;
    int32_t stride; /* ANTIDIAGONAL: divides block_size */
    pbs_reduce reduce;
    pbs_rule rule;
    float tau;
    uint32_t *bits; /* [B, Hq, Tq, W] out */
    int32_t *count; /* [B, Hq, Tq] out: bits set */
    float *mass;    /* [B, Hq, Tq, Tk] out, or NULL: exp of the strip (tests, plots) */
    void *workspace;
    size_t workspace_bytes;
    pbs_exec exec;
    pbs_normalize normalize; /* ROW: ANTIDIAGONAL (or mode NONE) without q_perm */
} pbs_select_params;

PBS_API pbs_status pbs_select_workspace_size(const pbs_select_params *params, size_t *bytes);
PBS_API pbs_status pbs_select(const pbs_select_params *params);

/* The seam between scoring blocks and choosing them. log_mass [rows, cols], -inf = no mass;
 * eligible [rows, ceil(cols / 32)]: bits a rule may set. */
typedef struct pbs_strip {
    int32_t rows;
    int32_t cols;
    float *log_mass;
    int64_t log_mass_stride;
    uint32_t *eligible;
    int64_t eligible_stride;
} pbs_strip;

/* Query blocks [row_begin, row_begin + strip->rows) of one head; strip->cols = Tk. Uses
 * params->workspace; params->bits, count and mass are not touched and may be NULL. */
PBS_API pbs_status pbs_score_strip(const pbs_select_params *params, int32_t batch, int32_t head,
                                   int32_t row_begin, pbs_strip *strip);
/* bits [rows, ceil(cols / 32)], count [rows] or NULL; scratch: 2 * cols words. */
PBS_API pbs_status pbs_apply_rule(pbs_rule rule, float tau, const pbs_strip *strip, uint32_t *bits,
                                  int32_t *count, uint32_t *scratch);

/* ---- attend: exact attention over what was selected (Alg. 1) --------------------------------- */
/* Online softmax over the listed blocks (unmasked, from packed) and the own span (causal, from the
 * original K/V). A row without a visible key gives 0 and lse = -inf.
 * CORRECTION_MEAN adds one pseudo-token for every block of history that is whole, seen by all rows
 * of the query block and not listed: its key and value are the means of the block's, rounded to
 * their dtype, its logit is softmax_scale * q . k_mean + ln(block_k). History is what lies before
 * the own span; under MASK what every row of the query block sees. lse includes them. */
typedef struct pbs_attend_params {
    size_t struct_size;
    pbs_view q;         /* [B, Hq, Nq, D] */
    pbs_kv k;           /* [B, Hk, Nk, D] */
    pbs_kv v;           /* [B, Hk, Nk, D] */
    const void *packed; /* from pbs_permute, or NULL: natural order, packed in the workspace */
    size_t packed_bytes;
    const uint32_t *bits;  /* [B, heads_sel, Tq, W]; NULL allowed for PBS_OWN_ALL */
    const int32_t *q_perm; /* [B, Hq, Nq] or NULL */
    pbs_geometry geometry;
    float softmax_scale;  /* 0 = D^-0.5 */
    int32_t block_q;      /* 64, 128 or 256 */
    int32_t block_k;      /* 64, 128 or 256; equal to block_q unless own is MASK */
    int32_t segment_size; /* read for SEGMENT and NONE, and with q_perm */
    int32_t heads_sel;    /* Hq or Hk; 0 = Hq */
    pbs_gqa gqa;          /* of packed */
    pbs_own own;
    pbs_view out; /* [B, Hq, Nq, D] out, dtype of q, caller's strides and query order */
    pbs_view lse; /* [B, Hq, Nq, 1] out, fp32, natural log; data NULL = not wanted */
    void *workspace;
    size_t workspace_bytes;
    pbs_exec exec;
    pbs_work_counters *counters; /* [exec.num_threads] or NULL: attend adds to them */
    pbs_correction correction;   /* MEAN: packed, if given, was made with it; own is not ALL */
} pbs_attend_params;

PBS_API pbs_status pbs_attend_workspace_size(const pbs_attend_params *params, size_t *bytes);
PBS_API pbs_status pbs_attend(const pbs_attend_params *params);

/* ---- prefill: plan (score, permute, select) and attend in one call --------------------------- */
/* Bit for bit what the four verbs give one after another, without k_perm, packed K/V and pools ever
 * standing in memory for all heads: K/V heads are taken in waves under workspace_cap. */
typedef struct pbs_prefill_params {
    size_t struct_size;
    pbs_view q;                   /* [B, Hq, Nq, D] */
    pbs_kv k;                     /* [B, Hk, Nk, D] */
    pbs_kv v;                     /* [B, Hk, Nk, D] */
    const int32_t *k_perm_in;     /* [B, Hp, Nk] or NULL: a given order instead of score */
    const int32_t *permute_heads; /* [Hp] or NULL */
    const float *tau_heads;       /* [Hq] or NULL */
    pbs_geometry geometry;
    float softmax_scale; /* 0 = D^-0.5 */
    int32_t block_size;
    int32_t segment_size;
    pbs_gqa gqa;
    pbs_permute_mode mode;
    pbs_order order;
    uint64_t seed;
    pbs_select_method method;
    int32_t stride;
    pbs_reduce reduce;
    pbs_rule rule;
    float tau;
    pbs_view out;    /* [B, Hq, Nq, D] out, dtype of q */
    pbs_view lse;    /* [B, Hq, Nq, 1] out, fp32; data NULL = not wanted */
    int32_t *count;  /* [B, Hq, Tq] out, or NULL */
    uint32_t *bits;  /* [B, Hq, Tq, W] out, or NULL */
    int32_t *k_perm; /* [B, Hp, Nk] out, or NULL */
    int32_t *q_perm; /* [B, Hq, Nq] out, or NULL */
    /* Bytes a wave may use; 0 = 16 MiB a thread, at most 256 MiB (CUDA: 1 GiB). One K/V head always
     * fits. */
    size_t workspace_cap;
    void *workspace;
    size_t workspace_bytes;
    pbs_exec exec;
    pbs_work_counters *counters; /* [exec.num_threads] or NULL: attend adds to them */
    pbs_normalize normalize;     /* ROW: ANTIDIAGONAL (or mode NONE), queries not permuted */
    pbs_correction correction;
} pbs_prefill_params;

PBS_API pbs_status pbs_prefill_workspace_size(const pbs_prefill_params *params, size_t *bytes);
PBS_API pbs_status pbs_prefill(const pbs_prefill_params *params);

/* ---- about this build ------------------------------------------------------------------------ */
PBS_API int pbs_abi_version(void);
PBS_API const char *pbs_build_info(void); /* compiler, flags, ISAs: one line of JSON */

#ifdef __cplusplus
}
#endif

#endif /* PBS_PBS_H */
