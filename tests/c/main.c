/* SPDX-License-Identifier: Apache-2.0
 *
 * All C tests, or those named on the command line.
 */
#include <stdio.h>

#include "harness.h"

static const test_case TESTS[] = {
    {"convert", test_convert},
    {"vec", test_vec},
    {"rule", test_rule},
    {"score", test_score},
    {"permute", test_permute},
    {"select", test_select},
    {"select_rows", test_select_rows},
    {"attend", test_attend},
    {"correction", test_correction},
    {"counters", test_counters},
    {"prefill", test_prefill},
    {"threads", test_threads},
    {"errors", test_errors},
    {"tiles", test_tiles},
    {"pipeline", test_pipeline},
    {"numerics", test_numerics},
    {"guards", test_guards},
};

int main(int argc, char **argv) {
    run_tests(TESTS, sizeof TESTS / sizeof *TESTS, argc, argv);
    pbs_isa isas[PBS_ISA_COUNT];
    int count = available_isas(PBS_DTYPE_BF16, isas);
    printf("%s: %d checks, %d failed; kernels:", argv[0], test_checks, test_failures);
    for (int i = 0; i < count; i++) printf(" %s", pbs_isa_name(isas[i]));
    printf("\n");
    return test_failures != 0;
}
