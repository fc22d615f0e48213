/* SPDX-License-Identifier: BSD-3-Clause
 *
 * In the guest: keeps a CPU busy, before every other thread that is not of the kernel's highest priority,
 * until a file is gone, 60 seconds at most.
 *
 *   hold CPU FILE     makes FILE; returns when the CPU is busy
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static void require(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(2);
    }
}

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    int ready[2];
    cpu_set_t cpus;
    struct sched_param first = { .sched_priority = sched_get_priority_max(SCHED_FIFO) };
    CPU_ZERO(&cpus);
    CPU_SET(atoi(words[1]), &cpus);
    require(creat(words[2], 0600) >= 0 && pipe(ready) == 0, words[2]);
    if (fork() > 0)
        return read(ready[0], &count, 1) == 1 ? 0 : 2;
    require(setsid() > 0 && sched_setaffinity(0, sizeof cpus, &cpus) == 0, "CPU");
    require(sched_setscheduler(0, SCHED_FIFO, &first) == 0, "priority");
    require(write(ready[1], "", 1) == 1, "pipe");
    for (time_t end = time(NULL) + 60; access(words[2], F_OK) == 0 && time(NULL) < end;)
        ;
    return 0;
}
