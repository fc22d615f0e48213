/* SPDX-License-Identifier: BSD-3-Clause
 *
 * In the guest: has the device of scribbler.py write all over 256 MiB of huge pages, while a process of this
 * program writes beside it into the same pages; `check` compares all of it with both records.
 *
 *   scribble begin RESOURCE MB_PER_SECOND     the device works, and so does a process that stays behind;
 *                                             prints the huge pages' addresses
 *   scribble check RESOURCE                   ends both; prints "pages N stale S lost L", status 1 if any
 *
 * RESOURCE is the folder of the device in /sys/bus/pci/devices. Needs hugepages=129 and /huge (hugetlbfs).
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, HUGE_PAGE = 2 << 20, CHUNK = 65536, PIECES = 128, PAGES = PIECES * (HUGE_PAGE / PAGE) };
enum { CHUNKS = PIECES * (HUGE_PAGE / CHUNK) };
enum { CONTROL = 0x00, STATUS = 0x04, RATE = 0x08, COUNT = 0x0c, TARGET = 0x18, PIECE = 0x400 };
enum { RUN = 1, DUMP = 2, FAILED = 4 };

/* The huge page behind the buffer: what the guest's own writer has done, and the device's record. */
struct notes {
    volatile uint64_t stop, ended, round, chunk;
};
enum { RECORD = 1 << 20 };

static volatile uint8_t *bar;
static uint8_t *buffer;
static struct notes *notes;

static void die(const char *what)
{
    perror(what);
    exit(2);
}

static volatile uint32_t *word(unsigned offset) { return (volatile uint32_t *)(bar + offset); }

static void open_all(const char *folder, int create)
{
    char path[256];
    snprintf(path, sizeof path, "%s/resource0", folder);
    int fd = open(path, O_RDWR | O_SYNC);
    if (fd < 0)
        die(path);
    bar = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bar == MAP_FAILED)
        die("mmap of BAR 0");
    fd = open("/huge/buffer", O_RDWR | (create ? O_CREAT : 0), 0600);
    if (fd < 0)
        die("/huge/buffer");
    size_t size = (size_t)(PIECES + 1) * HUGE_PAGE;
    buffer = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (buffer == MAP_FAILED)
        die("mmap of huge pages");
    notes = (struct notes *)(buffer + (size_t)PIECES * HUGE_PAGE);
}

static uint64_t physical(const void *address)
{
    uint64_t entry;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0 || pread(fd, &entry, 8, (uintptr_t)address / PAGE * 8) != 8 || !(entry >> 63))
        die("pagemap");
    close(fd);
    return (entry & ((1ull << 55) - 1)) * PAGE;
}

static void set_wide(unsigned offset, uint64_t value)
{
    *word(offset) = (uint32_t)value;
    *word(offset + 4) = (uint32_t)(value >> 32);
}

static uint64_t *own_word(uint64_t chunk) { return (uint64_t *)(buffer + (chunk + 1) * CHUNK - 8); }

/* Writes the number of the round into the last word of each chunk, a few thousand a second. */
static void write_beside(void)
{
    while (!notes->stop) {
        notes->chunk = 0;
        notes->round++;
        for (uint64_t chunk = 0; chunk < CHUNKS && !notes->stop; chunk++) {
            *(volatile uint64_t *)own_word(chunk) = notes->round;
            notes->chunk = chunk + 1;
            if (chunk % 64 == 63)
                usleep(10000);
        }
    }
    notes->ended = 1;
}

static int begin(unsigned rate)
{
    for (unsigned piece = 0; piece < PIECES; piece++) {
        uint64_t address = physical(buffer + (size_t)piece * HUGE_PAGE);
        set_wide(PIECE + 8 * piece, address);
        printf("%lx\n", (unsigned long)address);
    }
    fflush(stdout);
    *word(RATE) = rate;
    *word(COUNT) = PIECES;
    *word(CONTROL) = RUN;
    if (daemon(0, 0))
        die("daemon");
    write_beside();
    return 0;
}

static int has(const uint64_t *words, unsigned count, uint64_t value)
{
    for (unsigned i = 0; i < count; i++)
        if (words[i] != value)
            return 0;
    return 1;
}

static unsigned long stale(const uint32_t *record)
{
    unsigned long found = 0;
    for (unsigned page = 0; page < PAGES; page++) {
        unsigned spared = page % (CHUNK / PAGE) == CHUNK / PAGE - 1 ? 8 : 0;
        uint64_t value = record[page] ? (uint64_t)record[page] << 32 | page : 0;
        found += !has((uint64_t *)(buffer + (size_t)page * PAGE), PAGE / 8 - spared, value);
    }
    return found;
}

static unsigned long lost(void)
{
    unsigned long found = 0;
    for (uint64_t chunk = 0; chunk < CHUNKS; chunk++)
        found += *own_word(chunk) != notes->round - (chunk >= notes->chunk);
    return found;
}

static void await(unsigned bit)
{
    for (int i = 0; i < 3000 && *word(STATUS) & bit; i++)
        usleep(10000);
    if (*word(STATUS) & (bit | FAILED)) {
        fprintf(stderr, "the device failed: status %u\n", *word(STATUS));
        exit(2);
    }
}

static int check(void)
{
    notes->stop = 1;
    *word(CONTROL) = 0;
    for (int i = 0; i < 3000 && !notes->ended; i++)
        usleep(10000);
    await(RUN);
    set_wide(TARGET, physical(notes) + RECORD);
    *word(CONTROL) = DUMP;
    await(DUMP);
    const uint32_t *record = (const uint32_t *)((uint8_t *)notes + RECORD);
    unsigned long written = 0, bad = stale(record), own = lost();
    for (unsigned page = 0; page < PAGES; page++)
        written += record[page] != 0;
    printf("pages %lu stale %lu lost %lu rounds %lu\n", written, bad, own, (unsigned long)notes->round);
    return bad || own;
}

int main(int count, char **words)
{
    if (count < 3 || (words[1][0] == 'b' && count < 4))
        return 2;
    open_all(words[2], words[1][0] == 'b');
    return words[1][0] == 'b' ? begin((unsigned)atoi(words[3])) : check();
}
