/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A device of libvfio-user with memory behind BAR1: its sample server has no region larger than 12 KiB, and a
 * bulk read needs a longer one. Usage: bulk_server SOCKET MIB
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "libvfio-user.h"

static char *memory;
static size_t size;

static ssize_t access_memory(vfu_ctx_t *device, char *buffer, size_t count, loff_t offset, bool is_write)
{
    (void)device;
    if (offset < 0 || count > size || (size_t)offset > size - count) {
        errno = EINVAL;
        return -1;
    }
    if (is_write)
        memcpy(memory + offset, buffer, count);
    else
        memcpy(buffer, memory + offset, count);
    return (ssize_t)count;
}

int main(int argc, char **argv)
{
    vfu_ctx_t *device;

    if (argc != 3 || (size = strtoul(argv[2], NULL, 10) << 20) == 0) {
        fprintf(stderr, "usage: bulk_server SOCKET MIB\n");
        return 2;
    }
    memory = malloc(size);
    if (memory == NULL) {
        perror("bulk_server");
        return 1;
    }
    memset(memory, 0x5a, size); /* pages of its own, as a device that has been used has them */
    device = vfu_create_ctx(VFU_TRANS_SOCK, argv[1], 0, NULL, VFU_DEV_TYPE_PCI);
    if (device == NULL || vfu_pci_init(device, VFU_PCI_TYPE_CONVENTIONAL, PCI_HEADER_TYPE_NORMAL, 0) != 0
        || vfu_setup_region(device, VFU_PCI_DEV_BAR1_REGION_IDX, size, access_memory, VFU_REGION_FLAG_RW,
                            NULL, 0, -1, 0) != 0
        || vfu_realize_ctx(device) != 0 || vfu_attach_ctx(device) != 0) {
        perror("bulk_server");
        return 1;
    }
    while (vfu_run_ctx(device) == 0 || errno == EINTR)
        ;
    return 0;
}
