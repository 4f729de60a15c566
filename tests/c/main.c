/* SPDX-License-Identifier: Apache-2.0
 *
 * All C tests, or those named on the command line.
 */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "harness.h"

static const struct {
    const char *name;
    void (*run)(void);
} TESTS[] = {
    {"convert", test_convert}, {"rule", test_rule},       {"score", test_score},
    {"permute", test_permute}, {"select", test_select},   {"attend", test_attend},
    {"prefill", test_prefill}, {"threads", test_threads}, {"errors", test_errors},
};

static int wanted(const char *name, int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (strcmp(argv[i], name) == 0) return 1;
    return argc == 1;
}

int main(int argc, char **argv) {
    for (size_t i = 0; i < sizeof TESTS / sizeof *TESTS; i++) {
        if (!wanted(TESTS[i].name, argc, argv)) continue;
        int checks = test_checks, failures = test_failures;
        clock_t start = clock();
        test_name = TESTS[i].name;
        TESTS[i].run();
        printf("%-8s %7d checks %3d failed %6.2f s\n", TESTS[i].name, test_checks - checks,
               test_failures - failures, (double)(clock() - start) / CLOCKS_PER_SEC);
        fflush(stdout);
    }
    pbs_isa isas[PBS_ISA_COUNT];
    int count = available_isas(PBS_DTYPE_BF16, isas);
    printf("%s: %d checks, %d failed; kernels:", argv[0], test_checks, test_failures);
    for (int i = 0; i < count; i++) printf(" %s", pbs_isa_name(isas[i]));
    printf("\n");
    return test_failures != 0;
}
