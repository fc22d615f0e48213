/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * One byte there and one byte back over TCP, and how long that took. Usage:
 *
 *     tcp_rr serve PORT                answers every connection, one at a time, until it is killed
 *     tcp_rr ADDRESS PORT SECONDS      prints: count, p50, p99 and mean, the times in microseconds
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 1000000

static double times[MOST];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void no_delay(int fd)
{
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void serve(int port)
{
    struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons((unsigned short)port)};
    int zero = 0, one = 1, listener = socket(AF_INET6, SOCK_STREAM, 0);

    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero);
    if (listener < 0 || bind(listener, (struct sockaddr *)&here, sizeof here) != 0 || listen(listener, 4) != 0)
        fail("tcp_rr serve");
    for (;;) {
        char byte;
        int client = accept(listener, NULL, NULL);
        if (client < 0)
            fail("accept");
        no_delay(client);
        while (read(client, &byte, 1) == 1 && write(client, &byte, 1) == 1)
            ;
        close(client);
    }
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int dial(const char *address, const char *port)
{
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(port))};
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = v4.sin_port};
    int fd, six = strchr(address, ':') != NULL;

    if (inet_pton(six ? AF_INET6 : AF_INET, address, six ? (void *)&v6.sin6_addr : (void *)&v4.sin_addr) != 1) {
        fprintf(stderr, "tcp_rr: bad address %s\n", address);
        exit(1);
    }
    fd = socket(six ? AF_INET6 : AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, six ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4, six ? sizeof v6 : sizeof v4) != 0)
        fail("connect");
    no_delay(fd);
    return fd;
}

static void ask(int fd, double seconds)
{
    double begun = now(), end = begun + seconds * 1e6, before = begun;
    int count = 0;

    while (before < end && count < MOST) {
        char sent = (char)count, got = 0;
        double after;
        if (write(fd, &sent, 1) != 1 || read(fd, &got, 1) != 1 || got != sent)
            fail("round trip");
        after = now();
        times[count++] = after - before;
        before = after;
    }
    qsort(times, (size_t)count, sizeof times[0], compare);
    printf("%d %.1f %.1f %.1f\n", count, times[count / 2], times[count - 1 - count / 100], (before - begun) / count);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    if (argc == 3 && strcmp(argv[1], "serve") == 0)
        serve(atoi(argv[2]));
    if (argc != 4) {
        fprintf(stderr, "usage: tcp_rr serve PORT | tcp_rr ADDRESS PORT SECONDS\n");
        return 2;
    }
    ask(dial(argv[1], argv[2]), atof(argv[3]));
    return 0;
}
